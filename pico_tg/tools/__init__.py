"""What reports: the command line, pages, charts and measurements. Nothing imports it."""
