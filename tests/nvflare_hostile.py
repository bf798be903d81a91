"""A job of NVFLARE's simulator in which one of two clients sends damaged replies.

python tests/nvflare_hostile.py WORKSPACE
"""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.apis.dxo import DXO
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

EXAMPLE = Path(__file__).parent.parent / "examples/nvflare"


class Damage(DXOFilter):
    """Cuts the replies of site-2 short."""

    def __init__(self) -> None:
        super().__init__([], [])

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        if fl_ctx.get_identity_name() != "site-2":
            return None
        dxo.data = {"frame": dxo.data["frame"][:-7]}
        return dxo


def main() -> None:
    from model import Digits
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    from fedkd_fast.integrations.nvflare import add_compression

    recipe = FedAvgRecipe(
        name="hostile",
        model=Digits(),
        min_clients=2,
        num_rounds=2,
        train_script=str(EXAMPLE / "client.py"),
        train_args="--clients 2 --seed 0",
    )
    add_compression(recipe)
    recipe.add_client_output_filter(nvflare_hostile.Damage(), tasks=["train"])
    recipe.execute(SimEnv(num_clients=2, workspace_root=sys.argv[1]))


if __name__ == "__main__":
    sys.path[:0] = [str(EXAMPLE), str(Path(__file__).parent)]
    import nvflare_hostile  # the job names the class by this module

    main()
