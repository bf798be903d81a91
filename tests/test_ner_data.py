"""Tagged sentences from CoNLL files, annotated texts and the datasets library."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from fedkd_fast.tasks.brat import read_annotations, read_brat
from fedkd_fast.tasks.ner_data import find_datasets, read_conll, read_dataset, read_samples
from fedkd_fast.tasks.tagging import Sentence, iob2, read_tag, tag_set, words_of
from fedkd_fast.tasks.text_data import Columns

COLUMNS = Columns("tokens", "ner_tags")
CONLL = "a\tB-X\nb\tI-X\n\nc\tO\n"


def write_dataset(folder: Path, *splits: str, content: str = CONLL) -> Path:
    folder.mkdir(parents=True)
    for split in splits or ("train.conll", "test.conll"):
        (folder / split).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("IOB1", "I-X I-X B-X O I-Y I-X O I-X"),
        ("IOB2", "B-X I-X B-X O B-Y B-X O B-X"),
        ("IOBES", "B-X E-X S-X O S-Y S-X O S-X"),
        ("BILOU", "B-X L-X U-X O U-Y U-X O U-X"),
        ("no begin behind an end", "B-X E-X I-X O I-Y E-X O L-X"),
    ],
)
def test_schemes_agree(scheme: str, tags: str) -> None:
    marks = [read_tag(tag, "here") for tag in tags.split()]
    assert iob2(marks) == ["B-X", "I-X", "B-X", "O", "B-Y", "B-X", "O", "B-X"]


@pytest.mark.parametrize("tag", ["X", "B", "B-", "M-X", "o", "B-X ", "-X", ""])
def test_tags_of_no_scheme(tag: str) -> None:
    with pytest.raises(ValueError, match=f"^here: a tag must be O, .* got {tag!r}"):
        read_tag(tag, "here")


def test_types_with_hyphens() -> None:
    assert tag_set([Sentence(["a", "b"], ["B-of-two", "I-of-two"]), Sentence(["c"], ["O"])]) == [
        *("O", "B-of-two", "I-of-two")
    ]


def test_conll_formats_agree(tmp_path: Path) -> None:
    contents = {
        "tabs.conll": "Mild\tB-X\npain\tI-X\n\n.\tO\n",
        "spaces.txt": "-DOCSTART- -X- -X- O\n\nMild JJ I-NP I-X\npain NN I-NP I-X\n\n. . O O\n",
        "windows.tsv": "\ufeffMild\tB-X\r\npain\tI-X\r\n  \r\n\r\n.\tO\r\n\r\n",
        "documents.txt": "Mild B-X\npain I-X\n-DOCSTART- O\n. O",
    }
    wanted = [Sentence(["Mild", "pain"], ["B-X", "I-X"]), Sentence(["."], ["O"])]
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert read_conll(tmp_path / name) == wanted, name
    with gzip.open(tmp_path / "packed.conll.gz", "wt") as file:
        file.write(contents["tabs.conll"])
    assert read_conll(tmp_path / "packed.conll.gz") == wanted


def test_words_may_hold_spaces_between_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1 / 2\tCD\tB-X\n a \tO \n")
    assert read_conll(tmp_path / "a.tsv") == [Sentence(["1 / 2", " a "], ["B-X", "O"])]


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2009", "\x0c"])
def test_words_may_hold_other_spaces(space: str, tmp_path: Path) -> None:
    word = f"10{space}mg"
    (tmp_path / "a.conll").write_text(f"{word}  CD B-X \n", encoding="utf-8")
    assert read_conll(tmp_path / "a.conll") == [Sentence([word], ["B-X"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tO\nb\n", "line 2: a word and its tag are wanted, got 'b'"),
        ("a\tO\n\n\tO\n", "line 3: a word and its tag are wanted"),
        ("a\tO\nb\tNN\n", "line 2: a tag must be O, .* got 'NN'"),
    ],
)
def test_conll_rows_that_cannot_be_read(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(content)
    with pytest.raises(ValueError, match=f"a.conll, {message}"):
        read_conll(tmp_path / "a.conll")


@pytest.mark.parametrize("dev", ["dev.conll", "devel.tsv", "valid.txt"])
def test_splits_of_a_folder(dev: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", "train.txt", "test.conll", dev)
    splits = read_dataset(str(folder), COLUMNS)
    assert set(splits) == {"train", "test", "dev"}
    assert splits["train"] == [Sentence(["a", "b"], ["B-X", "I-X"]), Sentence(["c"], ["O"])]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train.txt",), "holds no test file"),
        (("train.txt", "train.conll", "test.txt"), "holds more than one train file"),
        (("train.txt", "test.txt", "dev.txt", "valid.txt"), "holds more than one dev file"),
    ],
)
def test_splits_that_are_not_clear(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data folder .* {message}"):
        read_dataset(str(write_dataset(tmp_path / "data", *files)), COLUMNS)


def test_empty_splits(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    (folder / "test.conll").write_text("\n-DOCSTART- O\n")
    with pytest.raises(ValueError, match="data .* hold no sentences in test"):
        read_dataset(str(folder), COLUMNS)


def test_datasets_are_found(tmp_path: Path) -> None:
    one, two = (str(write_dataset(tmp_path / "all" / name)) for name in ("b", "a"))
    (tmp_path / "all" / ".cache").mkdir()
    (tmp_path / "all" / "README.md").write_text("")
    assert find_datasets(str(tmp_path / "all")) == [two, one]
    assert find_datasets(one) == [one]
    assert find_datasets(f"{one}, {two}") == [one, two]
    assert find_datasets("owner/name,conll2003") == ["owner/name", "conll2003"]
    comma = str(write_dataset(tmp_path / "a,b"))
    assert find_datasets(comma) == [comma]
    (tmp_path / "all" / "c").mkdir()
    with pytest.raises(ValueError, match=r"data folder .*/all/c holds no train file \(\.conll, "):
        find_datasets(str(tmp_path / "all"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data folder .*/empty holds no train file"):
        find_datasets(str(tmp_path / "empty"))


@pytest.mark.parametrize("data", ["./nope", "/nope/a"])
def test_no_such_data(data: str) -> None:
    with pytest.raises(ValueError, match=f"data must be a folder or .*got '{data}': no such"):
        read_dataset(data, COLUMNS)


# Annotated texts

TEXT = "I felt a bit drowsy. Pain in\nmy leg and arm! Dr.X helped.\n"


def annotate(folder: Path, name: str, text: str, *lines: str, apart: bool = False) -> None:
    texts, annotations = (folder / "text", folder / "original") if apart else (folder, folder)
    texts.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    (annotations / f"{name}.ann").write_text("".join(line + "\n" for line in lines))


def entity(text: str, type_: str, *parts: str) -> str:
    spans = [(text.index(part), text.index(part) + len(part)) for part in parts]
    positions = ";".join(f"{start} {end}" for start, end in spans)
    return f"T1\t{type_} {positions}\t{' '.join(parts)}"


def one_document(tmp_path: Path, *lines: str, text: str = TEXT) -> list[Sentence]:
    """Read one text for each split, of which that for training is given."""
    for split in ("train", "test"):
        annotate(tmp_path / split, "a", text, *lines)
    return read_brat(tmp_path)["train"]


def test_entities_and_sentences_of_a_text(tmp_path: Path) -> None:
    found = one_document(
        tmp_path,
        entity(TEXT, "ADR", "a bit drowsy"),
        "#1\tAnnotatorNotes T1\tsomething",
        entity(TEXT, "ADR", "Pain", "leg"),  # in pieces, and over the end of a line
        "A1\tNegation T1",
    )
    words = [" ".join(sentence.words) for sentence in found]
    assert words == ["I felt a bit drowsy .", "Pain in my leg and arm !", "Dr . X helped ."]
    assert found[0].tags == ["O", "O", "B-ADR", "I-ADR", "I-ADR", "O"]
    assert found[1].tags == ["B-ADR", "I-ADR", "I-ADR", "I-ADR", "O", "O", "O"]


def test_of_entities_that_overlap_the_longest_is_kept(tmp_path: Path) -> None:
    found = one_document(
        tmp_path,
        entity(TEXT, "Symptom", "Pain"),
        entity(TEXT, "ADR", "Pain", "leg"),
        entity(TEXT, "ADR", "leg and arm"),
        entity(TEXT, "Other", "arm"),
    )
    assert found[2].tags == ["O"] * 5
    assert found[1].tags == ["B-ADR", "I-ADR", "I-ADR", "I-ADR", "O", "B-Other", "O"]


def test_entities_that_touch_are_two(tmp_path: Path) -> None:
    text = "knee pain headache today"
    found = one_document(
        *(tmp_path, entity(text, "ADR", "headache"), entity(text, "ADR", "knee pain")), text=text
    )
    assert found == [Sentence(text.split(), ["B-ADR", "I-ADR", "B-ADR", "O"])]


def test_annotations_may_begin_with_a_mark_and_hold_any_text(tmp_path: Path) -> None:
    content = "\ufeffT1\tADR 0 4\ta\x85b\u2028\r\nT2\tADR 5 9\tc\n"
    (tmp_path / "a.ann").write_text(content, encoding="utf-8", newline="")
    assert read_annotations(tmp_path / "a.ann", 9) == [("ADR", (0, 4)), ("ADR", (5, 9))]


@pytest.mark.parametrize("apart", [True, False])
def test_documents_in_one_piece_are_split_the_same_way_each_time(
    apart: bool, tmp_path: Path
) -> None:
    for number in range(20):
        text = f"document {number} hurts"
        annotate(tmp_path, f"d{number}", text, entity(text, "ADR", "hurts"), apart=apart)
    splits = read_dataset(str(tmp_path), COLUMNS)
    assert {split: len(found) for split, found in splits.items()} == {
        **{"train": 14, "dev": 2, "test": 4}
    }
    numbers = [sentence.words[1] for found in splits.values() for sentence in found]
    assert sorted(map(int, numbers)) == list(range(20))
    assert splits == read_dataset(str(tmp_path), COLUMNS)
    assert find_datasets(str(tmp_path)) == [str(tmp_path)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("T1\tADR 5\tx", "line 1: an entity must be ID, tab, type and positions, got 'T1"),
        ("T1 ADR 5 6", "line 1: an entity must be"),
        ("T1\tADR 5 99\tx", r"line 1: positions must lie in 0\.\.59, .* got 5 99"),
        ("T1\tADR 5 5\tx", "line 1: positions .* not be empty or reversed, got 5 5"),
        ("T1\tADR 9 5\tx", "line 1: positions .* not be empty or reversed, got 9 5"),
        ("T1\tADR 1 2;9 5\tx", "line 1: positions .* not be empty or reversed, got 1 2;9 5"),
        (f"T1\tADR 1 {'9' * 5000}\tx", "line 1: an entity must be"),
    ],
)
def test_annotations_that_make_no_sense(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ann").write_text(line)
    with pytest.raises(ValueError, match=f"a.ann, {message}"):
        read_annotations(tmp_path / "a.ann", 59)


def test_texts_without_annotations(tmp_path: Path) -> None:
    annotate(tmp_path, "a", TEXT)
    (tmp_path / "b.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"a \.txt and an \.ann file .* only one of b"):
        read_brat(tmp_path)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match="must hold at least 3 texts, got 1"):
        read_brat(tmp_path)
    annotate(tmp_path / "more" / "train", "a", TEXT)
    with pytest.raises(ValueError, match="more holds no annotated texts in test"):
        read_brat(tmp_path / "more")


# The datasets library


@pytest.mark.parametrize("named", [True, False])
def test_tags_from_the_datasets_library(named: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    names = ["O", "B-X", "I-X"]
    tag = datasets.ClassLabel(names=names) if named else datasets.Value("string")
    features = datasets.Features(
        words=datasets.Sequence(datasets.Value("string")), tags=datasets.Sequence(tag)
    )
    tags = [[1, 2, 0], [0], []]
    rows = {
        "words": [["a", "b", "c"], ["d"], []],
        "tags": tags if named else [[names[tag] for tag in row] for row in tags],
    }
    part = datasets.Dataset.from_dict(rows, features=features)
    saved = datasets.DatasetDict(train=part, test=part, validation=part)
    saved.save_to_disk(str(tmp_path / "saved"))
    splits = read_dataset(str(tmp_path / "saved"), Columns("words", "tags"))
    assert set(splits) == {"train", "test", "dev"}
    assert splits["dev"] == [
        *(Sentence(["a", "b", "c"], ["B-X", "I-X", "O"]), Sentence(["d"], ["O"]))
    ]
    assert find_datasets(str(tmp_path / "saved")) == [str(tmp_path / "saved")]
    with pytest.raises(ValueError, match="split train: no column 'tokens'"):
        read_dataset(str(tmp_path / "saved"), COLUMNS)


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ([["a"]], [[1]], "row 0: tags must be strings or have names, got 1"),
        ([["a"]], [["O", "O"]], r"row 0: as many tags as words are wanted, 1, got \['O', 'O'\]"),
        (["a b"], [["O"]], "row 0: a list of words is wanted, got 'a b'"),
        ([["a"]], [["NN"]], "row 0: a tag must be O"),
    ],
)
def test_rows_of_datasets_that_make_no_sense(
    words: list[object], tags: list[object], message: str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    part = datasets.Dataset.from_dict({"tokens": words, "ner_tags": tags})
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=message):
        read_dataset(str(tmp_path / "saved"), COLUMNS)


# What is to be tagged


def test_samples(tmp_path: Path) -> None:
    text = "Don't take 60mg!"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"tokens": ["a", "b c"]}) + "\n" + json.dumps({"text": text}) + "\n"
    )
    words, sentence = read_samples(tmp_path / "a.jsonl")
    assert (words.words, words.spans, words.content) == (
        ["a", "b c"],
        None,
        {"tokens": ["a", "b c"]},
    )
    assert sentence.words == ["Don", "'", "t", "take", "60mg", "!"]
    assert sentence.spans == words_of(text)
    assert [text[start:end] for start, end in words_of(text)] == sentence.words
    (tmp_path / "b.txt").write_text(f"{text}\n\nmore\n")
    assert [sample.content["text"] for sample in read_samples(tmp_path / "b.txt")] == [text, "more"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"words": []}', "line 1: no column 'tokens' or 'text'"),
        ('{"tokens": "a b"}', "line 1: a list of words is wanted, got 'a b'"),
        ('{"tokens": [1]}', "line 1: text must be a string, got 1"),
        ('{"text": 1}', "line 1: text must be a string, got 1"),
        ("\n", "holds no rows"),
    ],
)
def test_samples_that_cannot_be_read(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "a.jsonl")
