"""The Hugging Face Hub: an adapter and its model card go there as one commit, and come back by `user/name`.

Everything goes through `huggingface_hub`, which is imported when it is first needed; its errors come back as
`HubError`, in words. Downloads lie in its cache, so what was pulled once loads again without a network.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch

from convlora import files
from convlora._version import __version__
from convlora.errors import ConvloraError, FileError, HubError
from convlora.model_card import Page, is_consent, is_hub_id, model_card, without_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

    from convlora.adapter import Adapter

ADAPTER = "adapter.safetensors"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def push_to_hub(
    adapter: Adapter,
    repo_id: str,
    private: bool = True,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    filename: str = ADAPTER,
    base_model: str | None = None,
    license: str | tuple[str, str] | None = None,
    load_base: str | None = None,
    pictures: Iterable[str | Path] = (),
    person: str | None = None,
    consent: str | None = None,
    dtype: torch.dtype | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload the adapter, its model card and pictures as one commit; returns the URL of the commit or pull request.

    The repository is made if there is none, private unless `private=False`. Into one that exists the adapter goes
    only if it is as private as asked for: a push never publishes by accident, and changes no visibility. Of a card
    that is there already, what others wrote around convlora's page is kept. If anything fails before the commit,
    the repository holds what it held before; one that was just made stays, empty.

    An adapter is of a person if `person=` is given, here or to `save`, or its file said so. To publish it, in a
    new repository or into a public one, `consent=` must state that person's consent; file and card carry both.

    Args:
        repo_id: `"user/name"`; a bare name is one of your own.
        token: a token with write access; None: the one of `hf auth login` or of `HF_TOKEN`.
        revision: the branch that gets the commit, made from `main` if there is none of that name.
        create_pr: open a pull request instead.
        filename: the adapter's path in the repository; several adapters may share one repository and its card.
        base_model: `"user/name"` goes into the card's metadata, a URL or a name into its text, of a local path only
            the last part anywhere. None: what the adapter's file said.
        license: an identifier of the Hub such as `"apache-2.0"`, or `(name, URL of the text)` for one that the Hub
            does not list. None: that of the base model if it is on the Hub, else "other", unknown.
        load_base: code that makes `model`, the base, for the snippet on the card.
        pictures: image files (PNG, JPEG, WebP, GIF) for the card; they go up as they are, embedded data included.
        dtype: that of the tensors in the file, as for `save`.
        endpoint: URL of another Hub; None: `HF_ENDPOINT` or huggingface.co.

    Raises:
        HubError: no token, an invalid one or one without rights; a repository of the other visibility; no network;
            metadata that the Hub rejects; a repository that changed meanwhile.
        ConvloraError: a person's adapter is to be published without `consent=`.
        FileError: a picture is missing or no image file; the adapter cannot be saved.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api(token, endpoint)
    doing = f"cannot push to {repo_id!r}"
    given = {"base_model": base_model, "person": person, "consent": consent}
    metadata = adapter.record.told({key: value.strip() for key, value in given.items() if value and value.strip()})
    uploads = _uploads(pictures, filename)
    if not private:
        _check_consent(metadata, consent, f"{repo_id} is to be public")
    _check_token(token, doing, api.endpoint)
    with tempfile.TemporaryDirectory(prefix="convlora-") as folder:
        tensors, record = adapter.to_be_saved()
        tensors = {key: files.cast(tensor, dtype) for key, tensor in tensors.items()}
        shared = dict(metadata)
        if "base_model" in shared:
            shared["base_model"] = without_folder(shared["base_model"])
        path = files.write(Path(folder, ADAPTER), tensors, files.metadata_of(replace(record, metadata={}), shared))
        with _in_words(doing, api, repo_id, revision):
            repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
            parent = _open(api, repo_id, private, revision, create_pr, metadata, consent)
            page = Page(
                repo_id=repo_id,
                filename=filename,
                size=path.stat().st_size,
                dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.ndim}),
                pictures=list(uploads),
                base_model=metadata.get("base_model"),
                person=metadata.get("person"),
                consent=metadata.get("consent"),
                load_base=load_base,
            )
            licence = _licence(api, license, page.base_model)
            card = model_card(adapter, record, page, licence, _old_card(api, repo_id, parent, folder))
            operations = [
                CommitOperationAdd(filename, path),
                CommitOperationAdd("README.md", card.encode()),
                *(CommitOperationAdd(name, source) for name, source in uploads.items()),
            ]
            commit = api.create_commit(
                repo_id, operations, revision=revision, create_pr=create_pr, parent_commit=parent,
                commit_message=commit_message or f"{filename}: {record.method} adapter by convlora {__version__}",
            )  # fmt: skip
    adapter.record.metadata = metadata
    return str(commit.pr_url or commit.commit_url)


def pull(
    repo_id: str,
    filename: str = ADAPTER,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download one file of `"user/name"` and return its path in the cache; a file that is there is not fetched again.

    Args:
        filename, subfolder: which file of the repository.
        revision: a branch, tag or commit; None: `main`.
        token: None: the one of `hf auth login` or of `HF_TOKEN`, if any; False: none.
        cache_dir: None: `HF_HUB_CACHE`, in the home folder unless set.
        endpoint: URL of another Hub; None: `HF_ENDPOINT` or huggingface.co.

    Raises:
        HubError: no such repository, revision or file; no access; no network and not in the cache. With no network,
            or no access any more, a file in the cache is returned, as `huggingface_hub` does.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = _api(token, endpoint)
    name = f"{subfolder}/{filename}" if subfolder else filename
    with _in_words(f"cannot pull {name} of {repo_id!r}", api, repo_id, revision):
        try:
            return Path(api.hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir))
        except RemoteEntryNotFoundError:
            held = api.list_repo_files(repo_id, revision=revision)
            raise HubError(_not_there(repo_id, name, revision, held)) from None


def list_adapters(
    author: str | None = None,
    search: str | None = None,
    *,
    limit: int | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> list[ModelInfo]:
    """The repositories on the Hub that hold convlora adapters, your own private ones included.

    Args:
        author: a user or an organisation.
        search: text in the repository's name.
        limit: the most to return; None: all.

    Returns:
        huggingface_hub's `ModelInfo`: `.id`, `.sha`, `.private`, `.last_modified`, `.tags`, `.card_data`, …
    """
    api = _api(token, endpoint)
    with _in_words("cannot list adapters", api):
        found = api.list_models(filter="convlora", author=author, search=search, limit=limit, full=True, cardData=True)
        return list(found)


# ------------------------------------------------------------------------------------------------ steps of a push


def _api(token: str | bool | None, endpoint: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint, token, library_name="convlora", library_version=__version__)


def _uploads(pictures: Iterable[str | Path], filename: str) -> dict[str, Path]:
    """`{path in the repository: file here}` of the pictures, all checked, and the adapter's name checked."""
    parts = PurePosixPath(filename).parts
    if not filename.endswith(".safetensors") or "\\" in filename or ".." in parts or parts[0] == "/":
        raise FileError(f"filename is a path in the repository that ends in .safetensors, not {filename!r}")
    if isinstance(pictures, str | Path):
        pictures = [pictures]
    uploads: dict[str, Path] = {}
    for picture in map(Path, pictures):
        name = f"images/{picture.name}"
        if picture.suffix.lower() not in _PICTURES:
            raise FileError(f"{picture} is no picture for a model card: use {', '.join(_PICTURES)}")
        if not picture.is_file():
            raise FileError(f"no such picture: {picture}")
        if name in uploads:
            raise FileError(f"{picture} and {uploads[name]} have the same name; rename one of them")
        uploads[name] = picture
    return uploads


def _check_consent(metadata: dict[str, str], consent: str | None, why: str) -> None:
    if "person" in metadata and not is_consent(consent):
        recorded = metadata.get("consent")
        raise ConvloraError(
            f"this adapter shows a person, {metadata['person']!r}, and {why}: state that person's consent to the "
            'publication with consent="…"'
            + (f" (in the file stands {recorded!r}, which is not asked again)" if recorded and consent is None else "")
            + ", or push to a private repository. Nothing was uploaded"
        )


def _check_token(token: str | bool | None, doing: str, endpoint: str) -> None:
    from huggingface_hub import get_token

    if token is False or token == "" or (not isinstance(token, str) and get_token() is None):
        raise HubError(
            f"{doing} without a token: pass token=, or log in once with `hf auth login`, or set HF_TOKEN. A token "
            f"with write access is made at {endpoint}/settings/tokens"
        )


def _open(
    api: HfApi,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    metadata: dict[str, str],
    consent: str | None,
) -> str | None:
    """Make the repository or check the one there is; the commit to build on, None in a new one."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        head = api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if create_pr:
            raise
        # Not exist_ok: one that exists after all is hidden from this token, and may be public or not.
        api.create_repo(repo_id, private=private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision)
        return None
    if not head.private:
        _check_consent(metadata, consent, f"{repo_id} is public")
    if private and not head.private:
        raise HubError(
            f"{repo_id} is a public repository: pass private=False if the adapter may be read by all, or push to "
            "another name. Nothing was uploaded"
        )
    if head.private and not private:
        raise HubError(
            f"{repo_id} is a private repository, which private=False does not change: make it public in its settings "
            f"({api.endpoint}/{repo_id}/settings), or push without private=False. Nothing was uploaded"
        )
    if revision is None:
        return head.sha
    try:
        return api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        if create_pr or revision.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=revision)
        return head.sha


def _old_card(api: HfApi, repo_id: str, commit: str | None, folder: str) -> str | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if commit is None:
        return None
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=commit, cache_dir=folder)
    except RemoteEntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8-sig")


def _licence(api: HfApi, license: str | tuple[str, str] | None, base_model: str | None) -> dict[str, str]:
    """The card's licence fields: as given, else those of the base model's card, else none."""
    if isinstance(license, str):
        return {"license": license}
    if license is not None:
        return {"license": "other", "license_name": license[0], "license_link": license[1]}
    if base_model is None or not is_hub_id(base_model):
        return {}
    from huggingface_hub.errors import HTTPError

    try:
        card = api.model_info(base_model).card_data
    except (HTTPError, OSError, ValueError):
        return {}  # a base that cannot be asked is a base whose licence is unknown
    fields = {key: card.get(key) for key in ("license", "license_name", "license_link")} if card else {}
    link = fields.get("license_link")
    if link and "://" not in link:
        fields["license_link"] = f"{api.endpoint}/{base_model}/blob/main/{link}"
    return {key: value for key, value in fields.items() if isinstance(value, str)} if fields.get("license") else {}


# ------------------------------------------------------------------------------------------------ errors in words


@contextlib.contextmanager
def _in_words(doing: str, api: HfApi, repo_id: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a `HubError` that begins with `doing`."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        yield
    except (HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{doing}: {_reason(error, api, repo_id, revision)}") from error


def _reason(error: Exception, api: HfApi, repo_id: str | None, revision: str | None) -> str:
    from huggingface_hub import errors

    wrapped = isinstance(error, errors.LocalEntryNotFoundError) or type(error) is RuntimeError
    if wrapped and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "could not upload", "not in the cache": why stands below
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing was asked of the Hub, and the cache does not hold it"
    if isinstance(error, errors.HFValidationError):
        return f"a Hub id is written user/name ({error})"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"it is gated: ask for access at {api.endpoint}/{repo_id} and use a token of the account that got it"
            f"{_words_of(error)}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{api.endpoint} has no such repository, or it is private and the token may not see it. Check the name; "
            "for a private one pass token= or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {revision!r}{_revisions(api, repo_id)}"
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error, api)
    if isinstance(error, errors.HTTPError):
        return f"{api.endpoint} cannot be reached ({error}). Check the network; what is in the cache loads without it"
    if isinstance(error, ConnectionError) and "xet" in str(error):
        return f"{error}. If this Hub or network has no Xet storage, set HF_HUB_DISABLE_XET=1"
    return str(error).replace("Please retry with `force_download=True`", "Nothing of it was kept: try again")


def _status(error: Exception, api: HfApi) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    status, words = error.response.status_code, _words_of(error)
    if status == 401:
        return f"the token is not valid: expired, revoked or mistyped. See {api.endpoint}/settings/tokens{words}"
    if status == 403:
        return f"the token has no right to do that: it needs write access to this repository{words}"
    if status == 409:
        return f"it exists already, but the token may not see it, or somebody made it this moment{words}"
    if status == 412:
        return f"the repository changed in the meantime and nothing was written; push again{words}"
    if status == 429 or status >= 500:
        return f"the Hub answered {status}; try again later{words}"
    return f"the Hub answered {status}{words or f' ({error})'}"


def _words_of(error: Exception) -> str:
    said = getattr(error, "server_message", None)
    return f" ({' '.join(said.split())})" if said else ""


def _revisions(api: HfApi, repo_id: str | None) -> str:
    from huggingface_hub.errors import HTTPError

    try:
        refs = api.list_repo_refs(repo_id or "")
    except (HTTPError, OSError, ValueError):
        return ""  # it only adds to a message
    return f"; there are {', '.join(ref.name for ref in [*refs.branches, *refs.tags])}, and commits by their hash"


def _not_there(repo_id: str, name: str, revision: str | None, held: list[str]) -> str:
    at = f" at {revision!r}" if revision else ""
    adapters = [file for file in held if file.endswith(".safetensors")]
    if adapters:
        return f"{repo_id}{at} has no {name}; it has {_some(adapters)}: name one with filename="
    return f"{repo_id}{at} holds no {name}, no .safetensors file at all; it holds {_some(held) or 'nothing'}"


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")
