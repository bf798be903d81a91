"""The reader of MIND's layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_news import NEWS, behavior_lines, write_news

from fedkd_fast.tasks.mind_data import popularity_scores, read_behaviors, read_mind, read_news


@pytest.mark.parametrize("official", [False, True])
def test_both_layouts_hold_what_was_written(official: bool, tmp_path: Path) -> None:
    data = read_mind(str(write_news(tmp_path, official=official)))
    for seed, (split, count) in enumerate((("train", 40), ("test", 25))):
        shown = data[split]
        assert shown.labels is not None
        assert shown.news.ids == [f"N{number}" for number in range(NEWS)]
        for row, line in enumerate(behavior_lines(count, seed)):
            impression, user, _, history, candidates = line.rstrip("\n").split("\t")
            assert (shown.impressions[row], shown.users[row]) == (impression, user)
            assert " ".join(shown.news.ids[n] for n in shown.history.row(row)) == history
            start = shown.candidates.starts[row]
            found = [
                f"{shown.news.ids[n]}-{shown.labels[start + place]}"
                for place, n in enumerate(shown.candidates.row(row))
            ]
            assert " ".join(found) == candidates
    assert (data["train"].news is data["test"].news) == (not official)


def test_the_last_clicks_are_kept(tmp_path: Path) -> None:
    shown = read_mind(str(write_news(tmp_path)))["train"]
    rows = np.array([3, 0, 7])
    found, mask = shown.history.last(rows, 2)
    assert found.shape == mask.shape == (3, 2)
    for index, row in enumerate(rows):
        assert list(found[index][mask[index]]) == list(shown.history.row(row)[-2:])
    assert not mask[1].any()  # no history
    assert shown.history.last(rows[:0], 2)[0].shape == (0, 2)


def test_popularity_is_clicks_in_training(tmp_path: Path) -> None:
    data = read_mind(str(write_news(tmp_path, official=True)))
    clicks = Counter(
        candidate.removesuffix("-1")
        for line in behavior_lines(40, 0)
        for candidate in line.split("\t")[4].split()
        if candidate.endswith("-1")
    )
    test = data["test"]
    wanted = [clicks[test.news.ids[row]] for row in test.candidates.values]
    assert max(wanted) > 0
    assert list(popularity_scores(data["train"], test)) == wanted
    hidden = test._replace(labels=None)
    with pytest.raises(ValueError, match="train must tell clicks"):
        popularity_scores(hidden, test)


def test_impressions_without_clicks_are_read_to_be_ranked(tmp_path: Path) -> None:
    folder = write_news(tmp_path)
    (tmp_path / "behaviors.tsv").write_text("1\tU1\tnow\t\tN1 N2\n2\tU2\tnow\tN3\tN4\n")
    shown = read_behaviors(tmp_path / "behaviors.tsv", read_news(folder / "news.tsv.gz"))
    assert shown.labels is None
    assert list(shown.candidates.values) == [1, 2, 4]
    assert list(shown.history.starts) == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("news", "N0\ta\tb\n", "news.tsv, line 1: at least 4 columns wanted .*, got 3"),
        ("news", "N0\ta\tb\tc\n\nN0\ta\tb\tc\n", "news.tsv, line 3: news 'N0' occurs twice"),
        ("news", "", "news.tsv holds no news"),
        ("behaviors", "1\tU\tt\tN0\n", "behaviors.tsv, line 1: 5 columns wanted .*, got 4"),
        ("behaviors", "1\tU\tt\tN9\tN0-1\n", "line 1: news 'N9' is not in news.tsv"),
        ("behaviors", "1\tU\tt\t\tN0-1 N8-0\n", "line 1: news 'N8' is not in news.tsv"),
        ("behaviors", "1\tU\tt\t\tN0-1 N0\n", "candidates must end with -0 or -1, got 'N0'"),
        ("behaviors", "1\tU\tt\t\tN0-1 N0-2\n", "candidates must end with -0 or -1, got 'N0-2'"),
        ("behaviors", "1\tU\tt\t\t \n", "line 1: an impression without candidates"),
        ("behaviors", "", "behaviors.tsv holds no impressions"),
        ("behaviors", "1\tU\tt\t\tN0\n", "behaviors.tsv tells no clicks: candidates must end"),
    ],
)
def test_malformed_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    folder = write_news(tmp_path, official=True) / "MINDsmall_train"
    if name == "behaviors":
        (folder / "news.tsv").write_text("N0\ta\tb\tc\n")
    (folder / f"{name}.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mind(str(tmp_path))


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a folder of MIND, from https://msnews.github.io, got"):
        read_mind(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no train impressions: one of .*_train/behaviors"):
        read_mind(str(tmp_path))
    write_news(tmp_path, official=True)
    (tmp_path / "MINDlarge_valid").mkdir()
    (tmp_path / "MINDlarge_valid" / "behaviors.tsv").touch()
    with pytest.raises(ValueError, match="more than one file of test impressions"):
        read_mind(str(tmp_path))
    (tmp_path / "MINDlarge_valid" / "behaviors.tsv").unlink()
    (tmp_path / "MINDsmall_dev" / "news.tsv").unlink()
    with pytest.raises(ValueError, match="holds no news.tsv beside behaviors.tsv"):
        read_mind(str(tmp_path))
