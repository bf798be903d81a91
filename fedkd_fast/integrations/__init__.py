"""Other federated systems: their models travel as frames, with two lines changed in the user's app.

Nothing here is imported until it is used, and each module needs the framework that it is for:
``flower``, ``nvflare``, ``openfl``, ``appfl``, ``process_group``. `link` needs none of them: it is
what they have in common, and a start for an adapter of one's own.
"""
