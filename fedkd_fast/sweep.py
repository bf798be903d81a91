"""Many runs from one YAML file: methods or named runs, times settings, times seeds.

::

    common: {task: digits, rounds: 20}      # fields of TrainConfig that all runs have
    methods: [local, fedavg, fedkd]         # or, with options of each: {fedkd: {codec: wf0}}
    runs:                                   # or any runs, by name
      fedkd-paper: {method: fedkd, preset: paper}
    settings:                               # each run under each of them
      few: {clients: 2}
      many: {clients: [8, 16]}              # a list makes several: many-8, many-16
    seeds: [0, 1, 2]

A later line of ``common``, ``settings``, run overrules an earlier one. Each run has the folder
``<run>-<setting>-s<seed>``, without ``-<setting>`` where there are no settings. In paths, ``$NAME``
stands for what the environment has under that name.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_fast._device import require_device
from fedkd_fast._files import absolute, read_json_object, read_text
from fedkd_fast.config import TrainConfig, task_options
from fedkd_fast.runs import CONFIG, SUMMARY
from fedkd_fast.tasks import build_task
from fedkd_fast.tasks.content import changed_splits
from fedkd_fast.trainer import Progress, Run, configure, train

_PARTS = ("common", "methods", "runs", "settings", "seeds")
# What the file says in another way, or what has no place in it.
_RESERVED = {"seed": "list it under seeds", "out": "give the folder of the sweep"}
# Of a finished run, all else must be as in the file.
_UNCOMPARED = {"out", "overwrite"}
_PATHS = {"data", "mentor", "mentee"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=:-]*")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str  # the same for all seeds
    config: TrainConfig
    fields: Mapping[str, Any]  # what the file says of it
    finished: bool  # its folder holds it already

    @property
    def folder(self) -> Path:
        """Where it lies, or will."""
        return Path(str(self.config.out))

    def train(
        self, progress: Progress | None = None, stop: Callable[[], bool] | None = None
    ) -> Run:
        """Train it and write its folder, from where it was stopped, if it was."""
        return train(**self.fields, progress=progress, stop=stop, resume=True)


def plan_sweep(file: str | Path, out: str | Path) -> list[PlannedRun]:
    """Expand a file into runs, and check all of them.

    Args:
        file: YAML as above.
        out: folder of the runs' folders.

    Returns:
        The runs in the file's order, the seeds of each together.

    Raises:
        ValueError: the file is no such YAML; a value out of its range; a run folder that holds
            something else than its run, or a run on data that changed since. Names the place.
        TypeError: a value of a wrong type, or no field of `TrainConfig`. Names the place.
        OSError: the file cannot be read.
        ImportError: PyYAML is not installed.
    """
    path = Path(file)
    content = _read_yaml(path)
    for part in content:
        if part not in _PARTS:
            raise ValueError(f"{path}: parts are {', '.join(_PARTS)}, got {part!r}")
    common = _options(content.get("common"), f"{path}, common")
    runs, settings = _runs(content, path), _settings(content.get("settings"), path)
    planned = []
    for (run, options), (setting, changes) in itertools.product(runs, settings):
        name = f"{run}-{setting}" if setting else run
        for seed in _seeds(content.get("seeds"), path):
            folder = Path(out) / f"{name}-s{seed}"
            place = f"{path}, {folder.name}"
            fields = {**common, **changes, **options, "seed": seed, "out": str(folder)}
            paths = {key: _expanded(fields[key], key, place) for key in _PATHS & fields.keys()}
            planned.append(_planned(name, {**fields, **paths}, place))
    names = [run.folder.name for run in planned]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two runs would have the name {name}")
    _check_content([run for run in planned if run.finished])
    return planned


def _expanded(value: object, key: str, place: str) -> object:
    """Put what the environment has into a path."""
    if not isinstance(value, str):
        return value
    expanded = os.path.expandvars(value)
    left = re.search(r"\$(\w+|\{[^}]*\})", expanded)
    if left:
        raise ValueError(f"{place}: {key} names {left[0]}, which the environment does not have")
    return expanded


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses keys that occur twice, and reads 1e-3 as the number it is."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            # As written: what is merged in later may be given anew.
            keys = [key.value for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                line = node.start_mark.line + 1
                raise ValueError(f"key {twice[0]!r} occurs twice from line {line} on")
            return node

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    text = read_text(path)
    try:
        content = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # Also where a date is none, a number has thousands of digits, or brackets nest so.
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of {', '.join(_PARTS)}, got {content!r}")
    return content


def _options(value: object, place: str) -> dict[str, Any]:
    """Check the keys of options; what a value may be is the configuration's business."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{place}: options must be a mapping, got {value!r}")
    for key in value:
        if key in _RESERVED:
            raise ValueError(f"{place}: {key} is no option of a sweep: {_RESERVED[key]}")
        if key not in TrainConfig.__dataclass_fields__:
            raise TypeError(f"{place}: {key!r} is no field of TrainConfig")
    return value


def _runs(content: Mapping[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the runs of both parts by name."""
    methods = content.get("methods") or {}
    if isinstance(methods, list):
        methods = {str(method): None for method in methods}
    named = content.get("runs") or {}
    for part, value in (("methods", methods), ("runs", named)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, {part}: names with options are wanted, got {value!r}")
    found = [
        (_name(name, f"{path}, methods"), {"method": name, **_options(one, f"{path}, {name}")})
        for name, one in methods.items()
    ]
    found += [
        (_name(name, f"{path}, runs"), _options(one, f"{path}, {name}"))
        for name, one in named.items()
    ]
    if not found:
        raise ValueError(f"{path}: methods or runs must name at least one run")
    return found


def _settings(value: object, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the settings by name, those with lists one by one; a nameless one if there is none."""
    if value is None:
        return [("", {})]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}, settings: names with options are wanted, got {value!r}")
    found = []
    for name, options in value.items():
        place = f"{path}, settings, {_name(name, f'{path}, settings')}"
        found += list(_grid(str(name), _options(options, place), place))
    return found


def _grid(name: str, options: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Go through all combinations of what is listed."""
    lists = {key: value for key, value in options.items() if isinstance(value, list)}
    for key, value in lists.items():
        if not value:
            raise ValueError(f"{place}: {key} must list at least one value, got []")
    for values in itertools.product(*lists.values()):
        label = _name("-".join([name, *map(str, values)]), place)
        yield label, {**options, **dict(zip(lists, values, strict=True))}


def _seeds(value: object, path: Path) -> Sequence[int]:
    seeds = [0] if value is None else value
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{path}, seeds: a list of integers is wanted, got {value!r}")
    return seeds


def _name(value: object, place: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"{place}: a name must be letters, digits and . _ + = : - alone, got {value!r}"
        )
    return value


def _planned(name: str, fields: dict[str, Any], place: str) -> PlannedRun:
    general = TrainConfig()
    task, method = fields.get("task", general.task), fields.get("method", general.method)
    try:
        config = configure(task, method, fields)
        finished = Path(fields["out"]).exists()
        if not finished:
            require_device(config.device)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{place}: {error}") from error
    run = PlannedRun(name, config, fields, finished)
    if run.finished:
        _check_finished(run)
    return run


def _check_finished(run: PlannedRun) -> None:
    """Hold a folder against what the file says of it."""
    if not (run.folder / SUMMARY).is_file():
        raise ValueError(f"{run.folder} exists and is no finished run: remove or rename it")
    found = read_json_object(run.folder / CONFIG)
    # The data may decide more, as they did when it was trained.
    task = build_task(run.config.task, task_options(run.config))
    config = configure(task, run.config.method, run.fields)
    for field in dataclasses.fields(TrainConfig):
        wanted = getattr(config, field.name)
        # Runs of older versions lack newer fields, whose defaults are what was done then.
        value = found.get(field.name, getattr(TrainConfig(), field.name))
        if field.name in _PATHS and wanted is not None:
            wanted = absolute(wanted)
        if field.name not in _UNCOMPARED and value != wanted:
            raise ValueError(
                f"{run.folder} holds a run with {field.name} {value!r}, where the file asks for "
                f"{wanted!r}: remove or rename it, or give another --out"
            )


def _check_content(runs: Sequence[PlannedRun]) -> None:
    """Hold the data that finished runs had against those that the others would have."""
    known: dict[tuple[object, ...], object] = {}  # reading data may take long
    for run in runs:
        facts = read_json_object(run.folder / CONFIG).get("task_facts")
        began = facts.get("content") if isinstance(facts, dict) else None
        if began is None:  # of an older version
            continue
        config = run.config
        source = (
            *(config.task, config.data, config.partition),
            *(config.text_column, config.label_column),
        )
        if source not in known:
            known[source] = _content(config)
        changed = changed_splits(began, known[source])
        if changed:
            raise ValueError(
                f"{run.folder} holds a run on other {' and '.join(changed)} data than there are "
                "now: remove or rename it, or give another --out"
            )


def _content(config: TrainConfig) -> object:
    """Return digests of the data that are there; None where they are gone, and nothing can differ.

    What still has to be trained on them says why they cannot be read.
    """
    try:
        return getattr(build_task(config.task, task_options(config)), "content", None)
    except (ValueError, OSError):
        if any(Path(one.strip()).exists() for one in (config.data or "").split(",")):
            raise
        return None
