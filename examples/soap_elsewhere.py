"""Train a model that is not Pico with SOAP: a small network learns to multiply two numbers."""

from tinygrad import Tensor, TinyJit, nn

from pico_tg import SOAP

layers = [nn.Linear(2, 64), Tensor.tanh, nn.Linear(64, 64), Tensor.tanh, nn.Linear(64, 1)]
optimizer = SOAP(nn.state.get_parameters(layers), lr=1e-2)


@TinyJit
def train_step(x: Tensor) -> Tensor:
    loss = (x.sequential(layers) - x[:, :1] * x[:, 1:]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    return loss.realize(*optimizer.schedule_step())


with Tensor.train():
    for step in range(301):
        loss = train_step(Tensor.uniform(256, 2, low=-1, high=1).realize()).item()
        optimizer.refresh()  # every 10th call updates the eigenbases, on the host
        if step % 100 == 0:
            print(f"step {step}: mean squared error {loss:.5f}")
