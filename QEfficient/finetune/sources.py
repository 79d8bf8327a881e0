# SPDX-License-Identifier: BSD-3-Clause
"""Where rows come from: JSONL, CSV and Parquet files, the datasets library, a function of the user. Knows no formats."""

import csv
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import xxhash

from QEfficient.errors import ConfigError
from QEfficient.finetune.formats import Row
from QEfficient.finetune.rules import JSONL


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place.

    Raises:
        ConfigError: The file cannot be read, or is of an unknown kind.
    """
    kind = kind_of(path)
    if kind == "parquet":
        return read_parquet(path)
    return ((where, row) for _, where, row in (read_jsonl(path) if kind == "jsonl" else read_csv(path)))


def kind_of(path: Path) -> str:
    """Return what the name of a file says that it holds: ``"jsonl"``, ``"csv"`` or ``"parquet"``.

    Raises:
        ConfigError: Something else.
    """
    suffix = path.suffix.lower()
    if suffix in JSONL:
        return "jsonl"
    if suffix in (".csv", ".parquet"):
        return suffix[1:]
    raise ConfigError(f"{path}: data ends in .csv, .parquet, {', '.join(JSONL)}")


def read_jsonl(path: Path) -> Iterator[tuple[int, str, Row]]:
    """Yield offset, place and row of each line that is not empty.

    Raises:
        ConfigError: A line is not UTF-8 or not a JSON object.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except ValueError as e:  # also UnicodeDecodeError
                raise ConfigError(f"{where}: not a line of JSON: {e}") from e
            if not text:
                continue
            if not isinstance(row, dict):
                raise ConfigError(f'{where}: must be an object like {{"text": …}}, not {type(row).__name__}')
            yield start, where, row


def read_csv(path: Path) -> Iterator[tuple[int, str, Row]]:
    """Yield offset, place and row of each row of a CSV file, whose first line names the fields.

    Raises:
        ConfigError: A row has more or fewer fields than the first, or the file is not UTF-8.
    """
    with path.open("rb") as file:
        starts = [0]  # of the line that is read next
        reader = csv.reader(decoded_lines(file, 0, starts), strict=True)
        try:
            fields = next(reader, [])
            offset = starts[0]
            for values in reader:
                where = f"{path}:{reader.line_num}"
                if values and len(values) != len(fields):
                    raise ConfigError(f"{where}: must have {len(fields)} fields like the first line")
                if values:
                    yield offset, where, dict(zip(fields, values, strict=True))
                offset = starts[0]
        except (csv.Error, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}:{reader.line_num}: not CSV in UTF-8: {e}") from e


def decoded_lines(file: BinaryIO, start: int, starts: list[int] | None = None) -> Iterator[str]:
    """Yield lines as text, without the byte-order mark of a file's first; note in ``starts`` where the next one begins."""
    offset = start
    for line in file:
        offset += len(line)
        if starts is not None:
            starts[0] = offset
        yield line.decode("utf-8" if start or offset > len(line) else "utf-8-sig")


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a Parquet file.

    Raises:
        ConfigError: It is damaged, or pyarrow is not installed.
    """
    parquet = _optional("pyarrow.parquet", ".parquet files")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except OSError as e:  # also pyarrow's own errors, but those of others must keep their place
        raise ConfigError(f"{path}: not a Parquet file: {' '.join(str(e).split())}") from e
    except ValueError as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{path}: not a Parquet file: {' '.join(str(e).split())}") from e


def read_dataset(name: str, split: str, config: str | None = None, *, named: bool = False) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a dataset that the datasets library loads, each with its place; see :func:`load_table`.

    Args:
        name: As there.
        split: As there.
        config: As there.
        named: Give classes their names, where the dataset holds numbers and knows those.
    """
    table = load_table(name, split, config)
    names = _class_names(table) if named else {}
    for number, row in enumerate(table, start=1):
        for field, known in names.items():
            if row[field] in range(len(known)):  # -1 and none: it has no class
                row[field] = known[row[field]]
        yield f"{name}[{split}], row {number}", row


def _class_names(table: Any) -> dict[str, list[str]]:
    """Return the names of classes by the field that holds their numbers."""
    kind = _optional("datasets", "datasets").ClassLabel
    return {field: list(feature.names) for field, feature in table.features.items() if isinstance(feature, kind)}


def load_table(name: str | Path, split: str, config: str | None = None) -> Any:
    """Return a table that the datasets library keeps on disk, whose rows are found by number.

    Args:
        name: A Parquet file; else a folder that the library saved, a folder laid out as on the Hub, or a Hub id.
        split: Which part of it.
        config: Which of its configurations, if it has several.

    Raises:
        ConfigError: It cannot be loaded, has no such split, or the library is not installed.
    """
    datasets = _optional("datasets", "datasets")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say of a broken file is in its error
    folder = Path(name).expanduser()
    try:
        if isinstance(name, Path):
            if not _optional("pyarrow.parquet", ".parquet files").read_metadata(name).num_rows:
                raise ConfigError(f"{name} holds no examples")
            return datasets.Dataset.from_parquet(str(name))
        if not any((folder / f).is_file() for f in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(name, config, split=split, cache_dir=_cache_of(folder, datasets))
        if config:
            raise ConfigError(f"dataset {name!r} was saved without configurations: leave dataset_config out")
        found = datasets.load_from_disk(str(folder))
        if not hasattr(found, "keys"):
            found = {str(found.split or "train"): found}
            split = next(iter(found)) if split == "train" else split  # the default asks for nothing
        if split not in found:
            raise ConfigError(f"dataset {name!r} has no split {split!r}: it has {', '.join(found)}")
        found = found[split]
    except ConfigError:
        raise
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as e:
        cause = f" ({' '.join(str(e.__cause__).split())})" if e.__cause__ else ""
        raise ConfigError(
            f"dataset {str(name)!r} cannot be loaded: {' '.join(str(e).split())[:300]}{cause[:300]}"
        ) from e
    return found


def _cache_of(folder: Path, datasets: Any) -> str | None:
    """Return where the tables of a local folder's files are kept: elsewhere once a file has changed.

    datasets 5.2 takes what it has built before for a folder whose README names configurations, whatever its files hold by now.
    """
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hasher = xxhash.xxh3_64()
    for path in files:
        hasher.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / hasher.hexdigest())


def preprocessed(rows: Iterable[tuple[str, Row]], spec: str) -> Iterator[tuple[str, Row]]:
    """Yield what the user's function makes of each row, leaving out those for which it returns None.

    Args:
        rows: Each with its place.
        spec: ``file.py:function``.

    Raises:
        ConfigError: There is no such function, it failed, or it returned something else than a row.
    """
    function = load_function(spec)
    for where, row in rows:
        made = preprocess(function, row, where, spec)
        if made is not None:
            yield where, made


def preprocess(function: Callable[[Row], Any], row: Row, where: str, spec: str) -> Row | None:
    """Return what the user's function makes of a row, None if it shall be left out.

    Raises:
        ConfigError: The function failed, or returned something else than a row.
    """
    try:
        made = function(row)
    except Exception as e:  # whatever the user's code raises belongs to this row
        raise ConfigError(f"{where}: {spec} raised {type(e).__name__}: {e}") from e
    if made is not None and not isinstance(made, dict):
        raise ConfigError(f"{where}: {spec} returned {type(made).__name__}, not a row (dict) or None")
    return made


def load_function(spec: str) -> Callable[[Row], Any]:
    """Return the function named by ``file.py:function``.

    Raises:
        ConfigError: The file or the function is not there, or the file fails.
    """
    file, colon, name = spec.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"preprocess must be file.py:function, not {spec!r}")
    if not path.is_file():
        raise ConfigError(f"preprocess: there is no file {file!r}")
    description = importlib.util.spec_from_file_location(path.stem, path)
    if description is None or description.loader is None:
        raise ConfigError(f"preprocess: {file!r} is no Python module")
    module = importlib.util.module_from_spec(description)
    try:
        description.loader.exec_module(module)
    except Exception as e:  # the user's module
        raise ConfigError(f"preprocess: {file} raised {type(e).__name__}: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"preprocess: {file} has no function {name!r}")
    found: Callable[[Row], Any] = function
    return found


def _optional(module: str, what: str) -> ModuleType:
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(f"reading {what} needs {package}, which is not installed: pip install {package}") from e
