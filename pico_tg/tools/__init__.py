"""Command line, reports, pages, charts and benchmarks. The core does not depend on them."""
