"""FedAvg on handwritten digits with NVFLARE, with and without compression.

    python job.py [--plain] [--energy 0.9] [--diff] [--rounds 3] [--clients 2] [--seed 0]
                  [--workspace runs] [--out FILE.json]

Prints the accuracy of every round, and what crossed between server and clients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from measure import Measure, rounds_of, summary
from model import Digits, accuracy
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.recipe import SimEnv

from fedkd_fast.integrations.link import Compression
from fedkd_fast.integrations.nvflare import add_compression


def main() -> None:
    """Run one job in the simulator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="without compression")
    parser.add_argument("--energy", type=float, default=0.9, help="of replies; less, fewer bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--diff", action="store_true", help="clients send differences")
    parser.add_argument("--workspace", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="where the same is written as JSON")
    arguments = parser.parse_args()
    recipe = FedAvgRecipe(
        name="plain" if arguments.plain else "compressed",
        model=Digits(arguments.seed),
        min_clients=arguments.clients,
        num_rounds=arguments.rounds,
        train_script=str(Path(__file__).with_name("client.py")),
        train_args=f"--clients {arguments.clients} --seed {arguments.seed}",
        params_transfer_type=TransferType.DIFF if arguments.diff else TransferType.FULL,
    )
    log = (arguments.workspace / f"{recipe.name}.jsonl").resolve()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    # What is measured is what travels: after compression down, before decompression up.
    recipe.add_server_input_filter(Measure(str(log), "up"), tasks=["train"])
    if not arguments.plain:
        add_compression(recipe, up=Compression(energy=arguments.energy))
    recipe.add_server_output_filter(Measure(str(log), "down"), tasks=["train"])
    run = recipe.execute(
        SimEnv(num_clients=arguments.clients, workspace_root=str(arguments.workspace))
    )
    model = Digits()
    saved = Path(run.get_result()) / "server/simulate_job/app_server/FL_global_model.pt"
    model.load_state_dict(torch.load(saved, weights_only=True)["model"])
    final = accuracy(model)
    print(summary(log))
    print(f"accuracy of the final model: {final:.4f}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"accuracy": final, "rounds": rounds_of(log)}))


if __name__ == "__main__":
    main()
