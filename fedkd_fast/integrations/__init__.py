"""Other federated systems: their models travel as frames, with two lines changed in the user's app.

Nothing here is imported until it is used, and each module needs the framework that it is for:
``flower``, ``nvflare``, ``openfl``, ``appfl``; torch alone is enough for ``process_group``,
``outer_step`` and ``ddp``. `link` needs nothing: it is what Flower and NVFLARE have in common, and
a start for an adapter of one's own.
"""
