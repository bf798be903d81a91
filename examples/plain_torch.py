"""Two clients train one model; only bytes go between them and the server."""

import torch
from torch import nn

import fedkd_fast

torch.manual_seed(0)
torch.set_num_threads(1)
kinds = torch.randn(10, 64)


def samples(count):
    """Draw noisy samples of ten kinds."""
    labels = torch.randint(10, (count,))
    return kinds[labels] + 2 * torch.randn(count, 64), labels


def train(model, inputs, labels):
    """Go through the samples once."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.randperm(len(inputs)).split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()


layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
model = nn.Sequential(*layers)
shards, (test_inputs, test_labels) = [samples(500), samples(500)], samples(1000)

# One for each sender: it keeps what its last message left out.
clients = [fedkd_fast.Compressor(energy=0.95, feedback=True) for _ in shards]
server = fedkd_fast.Compressor(energy=0.95, feedback=True)
shared = {name: value.clone() for name, value in model.state_dict().items()}
print(f"the model has {sum(value.nbytes for value in shared.values()):,} bytes")
for number in range(1, 7):
    frames = []
    for shard, client in zip(shards, clients, strict=True):
        model.load_state_dict(shared)
        train(model, *shard)
        frames.append(client.compress(model.state_dict(), base=shared))  # travels up
    broadcast = fedkd_fast.aggregate(frames).recompress(server)  # travels down
    shared = fedkd_fast.decompress(broadcast, base=shared)  # everybody: the same bits
    model.load_state_dict(shared)
    accuracy = (model(test_inputs).argmax(1) == test_labels).float().mean()
    up, down = len(frames[0]), len(broadcast)
    print(
        f"round {number}: accuracy {accuracy:.1%}, a client sends {up:,} bytes, receives {down:,}"
    )
