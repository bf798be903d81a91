"""OpenFL: a collaborator that sends deltas in every round.

In ``plan.yaml``, beside the pipeline of `fedkd_fast.integrations.openfl`::

    collaborator:
      template: fedkd_fast.integrations.openfl_collaborator.DeltaCollaborator

A collaborator of OpenFL 1.9 looks for the weights that it started from under its own name. Those of
the first round are there; those of later rounds, made of a delta, lie under the aggregator's name
alone, so whole weights are sent, without any lossy pipeline. Here they lie under both names.
"""

from __future__ import annotations

from typing import Any

from openfl.component.collaborator.collaborator import Collaborator
from openfl.utilities import TensorKey


class DeltaCollaborator(Collaborator):  # type: ignore[misc]
    """OpenFL's collaborator, with the same settings; ``use_delta_updates`` is for both."""

    def get_data_for_tensorkey(self, tensor_key: Any) -> Any:
        """Return a tensor, and keep the model's under the collaborator's name too.

        Args:
            tensor_key: of OpenFL, what to look for.
        """
        array = super().get_data_for_tensorkey(tensor_key)
        name, _, round_number, report, tags = tensor_key
        own = TensorKey(name, self.collaborator_name, round_number, report, tags)
        if tuple(tags) == ("model",) and self.tensor_db.get_tensor_from_cache(own) is None:
            self.tensor_db.cache_tensor({own: array})
        return array
