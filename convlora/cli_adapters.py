"""The verbs for adapters: info, inspect, merge, convert, compare, extract, push, pull.

Each is a thin layer over the Python function of the same name and returns an `Output`: text for people and the same
as one JSON object. What a verb needs is imported when it runs, so that this file costs nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convlora.errors import ConvloraError, FileError

if TYPE_CHECKING:
    import torch

    from convlora.adapter import Adapter

FORMATS = ("convlora", "peft", "kohya", "diffusers")
_MODEL = "lab, a generator's .safetensors, or module:function[@weights.safetensors]"


class Output(NamedTuple):
    text: str
    data: dict[str, Any]
    status: int = 0  # of the program


def add_verbs(verbs: Any) -> None:
    """Add the verbs to argparse's subparsers; each sets `run`, a function from options to `Output`."""
    info = _verb(verbs, "info", _info, "the layers of a model that can be adapted")
    info.add_argument("model", metavar="MODEL", help=_MODEL)
    _patterns(info)

    inspect = _verb(verbs, "inspect", _inspect, "what an adapter file holds")
    inspect.add_argument("file", type=Path, metavar="FILE.safetensors")

    merge = _verb(verbs, "merge", _merge, "write a model with an adapter's change in its weights")
    merge.add_argument("model", metavar="MODEL", help=_MODEL)
    merge.add_argument("adapter", metavar="ADAPTER", help="an adapter file, or user/name on the Hub")
    _out(merge)
    merge.add_argument("--strength", type=float, help="factor on the change (default: as the file says, 1)")
    _dtype(merge)
    _any_base(merge)

    convert = _verb(verbs, "convert", _convert, "read an adapter of one library and write it for another")
    convert.add_argument("file", type=Path, metavar="IN", help="an adapter file, or PEFT's folder")
    _out(convert)
    convert.add_argument("--to", choices=FORMATS, required=True, help="format of OUT; peft writes a folder")
    _model(convert)
    convert.add_argument("--from", dest="source", choices=(*FORMATS, "loralib"), help="format of IN (default: seen)")
    convert.add_argument("--prefix", help="kohya: prefix of the keys (default: the file's own; lycoris to write)")
    convert.add_argument("--component", help='diffusers: the part of the pipeline that MODEL is, such as "unet"')
    convert.add_argument("--alpha", type=float, help="loralib: alpha, which its files do not hold")
    _dtype(convert)
    _any_base(convert)

    compare = _verb(verbs, "compare", _compare, "how two adapters of a model differ and disturb each other")
    compare.add_argument("a", metavar="A", help="an adapter file, or user/name on the Hub")
    compare.add_argument("b", metavar="B", help="another one")
    _model(compare)
    compare.add_argument("--by", choices=("layer", "block"), default="layer", help="weight changes (default layer)")
    compare.add_argument("--signs", action="store_true", help="also count opposite signs, which takes every ΔW")
    _any_base(compare)

    extract = _verb(verbs, "extract", _extract, "the adapter that turns a base model into a fine-tuned one")
    extract.add_argument("tuned", metavar="TUNED", help=_MODEL)
    extract.add_argument("base", metavar="BASE", help=_MODEL)
    _out(extract)
    how = extract.add_mutually_exclusive_group(required=True)
    how.add_argument("--rank", type=int, help="the most that a layer gets")
    how.add_argument("--energy", type=float, help="share of the squared change to keep, up to 1")
    how.add_argument("--bytes", type=int, help="largest size of OUT")
    _patterns(extract)
    extract.add_argument("--train", action="append", metavar="GLOB", default=[], help="tensors taken over in full")
    _dtype(extract)

    push = _verb(verbs, "push", _push, "upload an adapter with its model card to the Hugging Face Hub")
    push.add_argument("file", type=Path, metavar="FILE.safetensors")
    push.add_argument("repo", metavar="USER/NAME")
    _model(push)
    push.add_argument("--public", action="store_true", help="private otherwise")
    push.add_argument("--base-model", metavar="ID", help="the base's id on the Hub, or its name")
    push.add_argument("--license", metavar="ID", help="of the base, as the Hub writes it")
    push.add_argument("--person", help="whose adapter it is")
    push.add_argument("--consent", metavar="TEXT", help="that person's consent; needed for --public")
    push.add_argument("--picture", type=Path, action="append", default=[], metavar="FILE", help="for the card")
    push.add_argument("--revision", help="branch (default main)")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--pull-request", action="store_true", help="open one instead of committing")
    _endpoint(push)
    _dtype(push)
    _any_base(push)

    pull = _verb(verbs, "pull", _pull, "download an adapter from the Hugging Face Hub")
    pull.add_argument("repo", metavar="USER/NAME")
    _out(pull)
    pull.add_argument("--filename", default="adapter.safetensors", help="in the repository (default %(default)s)")
    pull.add_argument("--revision", help="branch, tag or commit (default main)")
    _endpoint(pull)


# ------------------------------------------------------------------------------------------------ the verbs


def _info(options: argparse.Namespace) -> Output:
    from convlora import adaptable
    from convlora.attach import base_parameters
    from convlora.cli_model import load_model
    from convlora.fingerprint import fingerprint

    model = load_model(options.model).model
    rows = adaptable(model, options.targets, options.exclude)
    values = sum(parameter.numel() for _, parameter in base_parameters(model))
    inside = sum(out * cols for out, cols in (row.matrix for row in rows))
    rank_1 = sum(out + cols for out, cols in (row.matrix for row in rows))
    data = {
        "model": type(model).__name__,
        "values": values,
        "fingerprint": fingerprint(model),
        "adaptable_values": inside,
        "rank_1_values": rank_1,
        "layers": [row._asdict() | {"max_rank": row.max_rank} for row in rows],
    }
    head = (
        f"{type(model).__name__}: {values:,} values, {inside:,} of them in {len(rows)} layers that can be adapted; "
        f"LoRA of rank 1 on all of these has {rank_1:,}\nfingerprint {data['fingerprint']}"
    )
    return Output("\n".join([head, *(f"  {row}" for row in rows)]), data)


def _inspect(options: argparse.Namespace) -> Output:
    from convlora import files

    tensors, metadata = files.read(options.file)
    record = files.record_of(options.file, metadata, tensors)
    size = options.file.stat().st_size
    texts = {key: metadata[key] for key in sorted(set(metadata) - {"options", "ranks", "trained", "buffers", "format"})}
    lines = [f"{options.file}: {record.method} adapter, {size:,} bytes"]
    lines += [f"  {key}: {value}" for key, value in texts.items()]
    lines.append(f"  options: {json.dumps(record.options)}")
    layers: dict[str, Any] = {}
    for layer, (rank, inner) in record.ranks.items():
        own = {key.rpartition("/")[2]: list(t.shape) for key, t in tensors.items() if key.rpartition("/")[0] == layer}
        layers[layer] = {"rank": rank, "inner": inner, "tensors": own}
        lines.append(f"  {layer}: rank {rank}" + (f" (inner {inner})" if inner != rank else "") + f" {own}")
    full = {
        name: list(tensors[f"train/{name}"].shape)
        for name in [*record.trained, *record.buffers]
        if f"train/{name}" in tensors
    }
    lines += [f"  {name}: in full {shape}" for name, shape in full.items()]
    data = {"file": str(options.file), "bytes": size, "method": record.method, "options": record.options}
    data |= {"metadata": texts, "layers": layers, "in_full": full}
    data["dtypes"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.ndim})
    return Output("\n".join(lines), data)


def _merge(options: argparse.Namespace) -> Output:
    from convlora.cli_model import load_model

    _check_free(options.out, options.force)
    loaded = load_model(options.model)
    adapter = _load(loaded.model, options.adapter, options.any_base)
    if options.strength is not None:
        adapter.set_strength(options.strength)
    record, layers = adapter.record, len(adapter.layers)
    # A model with a person merged into it is of that person as the adapter was.
    told = {key: value for key, value in record.metadata.items() if key in ("person", "consent")}
    adapter.merge(keep=False)
    path = loaded.write(options.out, _dtype_of(options), {"merged_adapter": Path(options.adapter).name, **told})
    size = path.stat().st_size
    data = {"file": str(path), "bytes": size, "method": record.method, "layers": layers}
    return Output(f"{path}: {size:,} bytes, {record.method} adapter merged into {layers} layers", data)


def _convert(options: argparse.Namespace) -> Output:
    from convlora import convert
    from convlora.cli_model import load_model

    _check_free(options.out, options.force)
    source = options.source or convert.sniff(options.file)
    model = load_model(options.model).model
    dtype = _dtype_of(options)
    if source == "convlora":
        adapter = _load(model, options.file, options.any_base)
    elif source == "peft":
        adapter = convert.from_peft(model, options.file)
    elif source == "kohya":
        adapter = convert.from_kohya(model, options.file, prefix=options.prefix)
    elif source == "diffusers":
        adapter = convert.from_diffusers(model, options.file, component=options.component)
    elif options.alpha is None:
        raise ConvloraError(f"{options.file} is in loralib's format, which does not hold alpha: pass --alpha")
    else:
        adapter = convert.from_loralib(model, options.file, options.alpha)
    if options.to == "convlora":
        path = adapter.save(options.out, dtype)
    elif options.to == "peft":
        path = convert.to_peft(adapter, options.out, dtype)
    elif options.to == "kohya":
        path = convert.to_kohya(adapter, options.out, options.prefix or "lycoris", dtype)
    else:
        path = convert.to_diffusers(adapter, options.out, options.component, dtype)
    written = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in written)
    data = {"file": str(path), "from": source, "to": options.to, "method": adapter.method, "bytes": size}
    data["layers"] = len(adapter.layers)
    text = f"{path}: {size:,} bytes, {adapter.method} on {len(adapter.layers)} layers, {source} to {options.to}"
    return Output(text, data)


def _compare(options: argparse.Namespace) -> Output:
    from convlora import conflict, weight_change
    from convlora.cli_model import load_model

    model = load_model(options.model).model
    a = _load(model, options.a, options.any_base, "a")
    b = _load(model, options.b, options.any_base, "b")
    found = conflict(a, b, signs=options.signs)
    changes = {adapter.name: weight_change(adapter, by=options.by) for adapter in (a, b)}
    data = {"a": str(options.a), "b": str(options.b), "conflict": json.loads(found.json())}
    data["weight_change"] = {name: json.loads(change.json()) for name, change in changes.items()}
    parts = [f"a: {options.a}\nb: {options.b}", found.table()]
    parts += [f"weight change of {name}\n{change.table()}" for name, change in changes.items()]
    return Output("\n\n".join(parts), data)


def _extract(options: argparse.Namespace) -> Output:
    from convlora import extract
    from convlora.cli_model import load_model

    _check_free(options.out, options.force)
    tuned, base = load_model(options.tuned).model, load_model(options.base).model
    dtype = _dtype_of(options)
    adapter = extract(
        tuned, base, options.rank, energy=options.energy, bytes=options.bytes, targets=options.targets,
        exclude=options.exclude, train=options.train, dtype=dtype,
    )  # fmt: skip
    path = adapter.save(options.out, dtype)
    result = adapter.options["extracted"]
    ranks = {layer: rank for layer, (rank, _) in adapter.record.ranks.items()}
    data = {"file": str(path), "bytes": path.stat().st_size, "ranks": ranks, "extracted": result}
    lines = [
        f"{path}: {path.stat().st_size:,} bytes, {len(ranks)} layers of rank {min(ranks.values(), default=0)} to "
        f"{max(ranks.values(), default=0)}; relative error {result['total']:.2%}"
    ]
    lines += [f"  {layer}: rank {rank}, error {result['layers'][layer]:.2%}" for layer, rank in ranks.items()]
    if result["left_out"]:
        lines.append(f"changed, but not in the adapter (see --train): {', '.join(result['left_out'])}")
    return Output("\n".join(lines), data)


def _push(options: argparse.Namespace) -> Output:
    from convlora.cli_model import load_model

    adapter = _load(load_model(options.model).model, options.file, options.any_base)
    url = adapter.push_to_hub(
        options.repo, private=not options.public, revision=options.revision, create_pr=options.pull_request,
        commit_message=options.message, base_model=options.base_model, license=options.license,
        pictures=options.picture, person=options.person, consent=options.consent, dtype=_dtype_of(options),
        endpoint=options.endpoint,
    )  # fmt: skip
    return Output(url, {"repo": options.repo, "url": url, "private": not options.public})


def _pull(options: argparse.Namespace) -> Output:
    from convlora import files, hub

    _check_free(options.out, options.force)
    cached = hub.pull(options.repo, options.filename, revision=options.revision, endpoint=options.endpoint)
    tensors, metadata = files.read(cached)
    record = files.record_of(cached, metadata, tensors)
    with files.replacing(options.out) as temporary:
        shutil.copyfile(cached, temporary)
    size = options.out.stat().st_size
    data = {"file": str(options.out), "bytes": size, "repo": options.repo, "method": record.method}
    return Output(f"{options.out}: {size:,} bytes, {record.method} adapter of {options.repo}", data)


# ------------------------------------------------------------------------------------------------ shared options


def _verb(verbs: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, errors too")
    parser.set_defaults(run=run)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=f"the base: {_MODEL}")


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--force", action="store_true", help="write over what is there")


def _dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the tensors in the file")


def _any_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--any-base", action="store_true", help="also on weights that the adapter is not made for")


def _endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="URL", help="of another Hub (default HF_ENDPOINT or huggingface.co)")


def _patterns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", action="append", metavar="GLOB", help="only these layers; may be repeated")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="not these layers; may be repeated")


def _check_free(out: Path, force: bool) -> None:
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not force:
        raise FileError(f"{out} exists; choose another name, or pass --force to write over it")


def _dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def _load(model: Any, adapter: str | Path, any_base: bool, name: str = "default") -> Adapter:
    from convlora import load_adapter

    return load_adapter(model, adapter, name, check_base=not any_base)
