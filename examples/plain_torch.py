"""Two clients train one model; only bytes go between them and the server."""

import torch
from torch import nn

import fedkd_fast

torch.manual_seed(0)
torch.set_num_threads(1)
labels = torch.randint(10, (2000,))
inputs = torch.randn(10, 64)[labels] + 2 * torch.randn(2000, 64)  # noisy samples of ten kinds
shards, test = (slice(500), slice(500, 1000)), slice(1000, 2000)
layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
model = nn.Sequential(*layers)

clients = [fedkd_fast.Compressor(energy=0.95, feedback=True) for _ in shards]
server = fedkd_fast.Compressor(energy=0.95, feedback=True)  # each keeps what it left out
shared = {name: value.clone() for name, value in model.state_dict().items()}
print(f"the model has {sum(value.nbytes for value in shared.values()):,} bytes")
for number in range(1, 7):
    frames = []
    for shard, client in zip(shards, clients, strict=True):
        model.load_state_dict(shared)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for some, kinds in zip(inputs[shard].split(32), labels[shard].split(32), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(some), kinds).backward()
            optimizer.step()
        frames.append(client.compress(model.state_dict(), base=shared))  # travels up
    broadcast = fedkd_fast.aggregate(frames).recompress(server)  # travels down
    shared = fedkd_fast.decompress(broadcast, base=shared)  # everybody: the same bits
    model.load_state_dict(shared)
    accuracy = (model(inputs[test]).argmax(1) == labels[test]).float().mean()
    up, down = len(frames[0]), len(broadcast)
    print(f"round {number}: accuracy {accuracy:.1%}, a client sends {up:,} bytes, gets {down:,}")
