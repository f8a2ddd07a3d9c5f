"""The Visformer that hubs know: `from_pretrained`, `save_pretrained` and `push_to_hub`.

    model = visformer.Visformer.from_pretrained("owner/name")
    model.push_to_hub("owner/name")

The network is that of `visformer.models`; this class adds `huggingface_hub`'s mixin. A folder that it writes holds
`model.safetensors` (our one-file checkpoint, which is all that is needed), `config.json` (the same facts for people and
other tools) and `README.md` (the model card).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelHubMixin

from visformer import models
from visformer.atomic import atomic_text
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.conversion import CUSTOM, read_any
from visformer.data.preprocessing import Preprocessing, for_channels
from visformer.errors import UsageError
from visformer.hub.card import model_card
from visformer.hub.fetch import HUB_PREFIX, SUFFIXES, fetch, fetch_repository
from visformer.hub.published import HUB
from visformer.hub.repository import SAFETENSORS, RepositoryName, hub_errors, parse_repository
from visformer.models import VARIANTS, Architecture

CONFIG = "config.json"


class Visformer(
    models.Visformer, ModelHubMixin, library_name="visformer", pipeline_tag="image-classification", tags=["visformer"]
):
    """An image classifier: float (B, in_channels, H, W), normalised, to logits (B, num_classes).

    All that `visformer.models.Visformer` is, with what hubs want.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **choices: Any,
    ) -> Visformer:
        """The model of a hub's repository or a folder, in evaluation mode on the CPU, as `visformer.load` gives it.

        Args:
            pretrained_model_name_or_path: owner/name on the hub, a folder or file that is here, or any other source
                that `visformer.load` takes. The weights may be in any published format.
            force_download, token, cache_dir, local_files_only: as `huggingface_hub.hf_hub_download` takes them.
            revision: branch, tag or commit of the repository.
            choices: what a foreign file does not tell, as in `visformer.conversion.read_any`: model, source, gelu, ...

        Raises `UsageError` for what is not there or does not fit, `RunError` when the hub cannot be reached.
        """
        given = pretrained_model_name_or_path
        return cls._from_pretrained(
            model_id=str(given.absolute() if isinstance(given, Path) else given),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            **choices,
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> Visformer:
        """The mixin's hook. Its own `from_pretrained` reads config.json for the constructor's arguments before it comes
        here; ours does not, because the checkpoint has them."""
        repository = _repository(model_id, revision)
        if repository is None:
            fetched = fetch(model_id)
        else:
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            fetched = fetch_repository(repository, model_id, force_download=force_download, **options)
        told: dict[str, Any] = {"model": fetched.model, "source": fetched.source}
        return read_any(fetched.path, **(told | model_kwargs)).build(cls)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook: the checkpoint and config.json. The mixin writes README.md if there is none."""
        checkpoint = checkpoint_of(self)
        write_checkpoint(save_directory / SAFETENSORS, checkpoint)
        document = {
            "library_name": "visformer",
            "model_name": checkpoint.model_name,
            "architecture": checkpoint.architecture.to_dict(),
            "class_names": checkpoint.class_names,
            "preprocessing": checkpoint.preprocessing.to_dict(),
        }
        atomic_text(save_directory / CONFIG, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, with `visformer.hub.model_card`'s arguments: repo_id, license, report."""
        return ModelCard(model_card(checkpoint_of(self), *args, **kwargs))

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """Put the model into a repository, which is made if need be, in one commit; returns the commit's address.

        Args:
            repo_id: owner/name, or a name of the owner who is logged in.
            model_card_kwargs: arguments of `visformer.hub.model_card`, such as license and validate's report.
            options: as in `huggingface_hub.ModelHubMixin.push_to_hub`: private, token, branch, create_pr,
                commit_message, ignore_patterns="README.md" to leave the repository's own card alone, ...

        Raises `UsageError` when you are not logged in or may not write there, `RunError` when the hub refuses.
        """
        with hub_errors(f"{HUB}{repo_id}"):
            if "/" not in repo_id:  # the card names the owner too
                api = HfApi(token=options.get("token"))
                repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
            card = {"repo_id": repo_id} | (model_card_kwargs or {})
            return super().push_to_hub(repo_id, model_card_kwargs=card, **options)


def checkpoint_of(model: models.Visformer) -> Checkpoint:
    """All that is known of a model. One that was not loaded gets the classes "0", "1", ... and plain preprocessing."""
    state_dict = model.state_dict()
    if any(tensor.is_meta for tensor in state_dict.values()):
        raise UsageError("the model is on the meta device and has no weights; build it on another one to save it")
    architecture = model.config
    names = [str(name) for name in getattr(model, "class_names", [])]
    if len(names) != architecture.num_classes:  # fresh, or with another head than it came with
        names = [str(index) for index in range(architecture.num_classes)]
    return Checkpoint(
        model_name=getattr(model, "model_name", None) or _name_of(architecture),
        architecture=architecture,
        class_names=names,
        preprocessing=_preprocessing_of(model),
        state_dict=state_dict,
        training=getattr(model, "training_summary", {}),
        source=getattr(model, "source", {}),
    )


def _repository(model_id: str, revision: str | None) -> RepositoryName | None:
    """The repository that is meant: hf-hub:owner/name, or plainly owner/name if no such file or folder is here."""
    prefix = HUB_PREFIX.match(model_id)
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", model_id) and not model_id.endswith(SUFFIXES)
    if not prefix and (not plain or os.path.exists(model_id)):
        if revision is not None:
            raise UsageError(f"revision: {revision!r} is for a repository of the hub; {model_id} is none")
        return None
    repository = parse_repository(model_id[prefix.end() :] if prefix else model_id)
    if revision is not None and repository.revision not in (None, revision):
        raise UsageError(f"revision: {revision!r} is not the {repository.revision!r} of {model_id}; give one of them")
    return RepositoryName(repository.repo_id, revision or repository.revision)


def _preprocessing_of(model: models.Visformer) -> Preprocessing:
    architecture, known = model.config, getattr(model, "preprocessing", None)
    if isinstance(known, Preprocessing) and known.in_channels == architecture.in_channels:
        return replace(known, image_size=architecture.image_size)
    plain, channels = Preprocessing(architecture.image_size), architecture.in_channels
    mean, std = (for_channels(getattr(plain, name), channels, name) for name in ("mean", "std"))
    return replace(plain, mean=mean, std=std, in_channels=channels)


def _name_of(architecture: Architecture) -> str:
    """The published model with the same layers; the sizes of input and output and rates of dropout are free."""
    free = {"num_classes", "image_size", "in_channels", "gelu", "drop_rate", "attn_drop_rate", "drop_path_rate"}
    own = {name: getattr(architecture, name) for name in free}
    for name, variant in VARIANTS.items():
        if replace(variant.architecture, **own) == architecture:
            return name
    return CUSTOM
