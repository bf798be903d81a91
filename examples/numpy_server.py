"""A server that sees numpy arrays alone, with an optimiser of its own; clients as well.

Needs `pip install fedkd-fast` without extras.
"""

import numpy as np

import fedkd_fast

CLASSES, FEATURES = 10, 784
SCALES = np.geomspace(3, 0.01, FEATURES, dtype=np.float32)


class Client:
    """Softmax regression on samples of its own."""

    def __init__(self, seed, kinds, count):
        random = np.random.default_rng(seed)
        self.labels = random.integers(CLASSES, size=count)
        noise = random.standard_normal((count, FEATURES), np.float32)
        self.inputs = SCALES * (kinds[self.labels] + 4 * noise)
        self.compressor = fedkd_fast.Compressor(energy=0.95, feedback=True)

    def scores(self, weights):
        """Return a score for each sample and class."""
        return self.inputs @ weights["w"] + weights["b"]

    def reply(self, broadcast, weights):
        """Bytes in, bytes out: `weights` is what this client held before."""
        if broadcast is not None:
            weights = fedkd_fast.as_numpy(fedkd_fast.decompress(broadcast, base=weights))
        trained = {name: value.copy() for name, value in weights.items()}
        for _ in range(10):
            scores = self.scores(trained)
            odds = np.exp(scores - scores.max(1, keepdims=True))
            error = odds / odds.sum(1, keepdims=True) - np.eye(CLASSES)[self.labels]
            trained["w"] -= 3e-3 * (self.inputs.T @ error / len(error)).astype(np.float32)
            trained["b"] -= 3e-3 * error.mean(0).astype(np.float32)
        return self.compressor.compress(trained, base=weights), weights


class Server:
    """FedAvg with momentum, in numpy."""

    def __init__(self, weights):
        self.weights = weights
        self.velocity = {name: np.zeros_like(value) for name, value in weights.items()}
        self.compressor = fedkd_fast.Compressor(energy=0.95, feedback=True)

    def step(self, frames, counts):
        """Bytes in, bytes out."""
        mean = fedkd_fast.aggregate(frames, weights=counts, schema=self.weights)
        for name, change in fedkd_fast.as_numpy(mean).items():
            self.velocity[name] = 0.5 * self.velocity[name] + change
        wanted = {name: self.weights[name] + self.velocity[name] for name in self.weights}
        broadcast = self.compressor.compress(wanted, base=self.weights)
        # What clients will have, to the bit.
        self.weights = fedkd_fast.as_numpy(fedkd_fast.decompress(broadcast, base=self.weights))
        return broadcast, mean.refused


kinds = np.random.default_rng(0).standard_normal((CLASSES, FEATURES), np.float32)
start = {"w": np.zeros((FEATURES, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
clients, test = [Client(seed, kinds, 500 * seed) for seed in (1, 2)], Client(3, kinds, 1000)
server, held, broadcast = Server(start), [start, start], None
print(f"weights have {sum(value.nbytes for value in start.values()):,} bytes")
for number in range(1, 6):
    frames = []
    for index, client in enumerate(clients):
        frame, held[index] = client.reply(broadcast, held[index])
        frames.append(frame)
    if number == 3:  # a client's bytes never end the server
        frames.append(b"not a frame")
    counts = [len(client.labels) for client in clients] + [100] * (len(frames) - len(clients))
    broadcast, refused = server.step(frames, counts)
    accuracy = (test.scores(server.weights).argmax(1) == test.labels).mean()
    up = len(frames[0])
    print(f"round {number}: accuracy {accuracy:.1%}, {up:,} bytes up, {len(broadcast):,} down")
    for name, reason in refused.items():
        print(f"  frame {name} refused: {reason}")
