"""How each project names a Visformer's tensors: one table of rules for each, read in both directions.

A rule pairs our name with the other project's. Placeholders: {s} a stage of ours, from 0; {b} a block in its stage;
{layer}, {param}: any one word; {norm}: a tensor of a norm, for which MindCV has words of its own. On the other side {e}
is the number of the stage's embedding and {g} that of its blocks: the other projects number stages 1 to 3 where a
network has three and 0 to 3 where it has four, and net1 keeps its only blocks in stage 2 behind embedding 1.

The tables are applied to the names of a given model, so what results is complete: every tensor of the model has exactly
one name there. What a file has beyond that is either in `extras`, with the reason why it may be left out, or an error.
Source: the state dicts of MindCV 0.3, danczs/Visformer and timm 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from visformer.models import Architecture

_TORCH_NORM = {name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
_MINDSPORE_NORM = _TORCH_NORM | {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


@dataclass(frozen=True)
class Rule:
    """One line of a table: our name, theirs, and how many axes of length 1 theirs has after ours."""

    ours: str
    theirs: str
    trailing_axes: int = 0


@dataclass(frozen=True)
class Name:
    """A tensor's name in another project, the axes of length 1 that it has there beyond ours, and the rule."""

    theirs: str
    trailing_axes: int
    rule: Rule


@dataclass(frozen=True)
class Layout:
    """A project's names. `gelu` is the form that its code computes, None where it computes what the model asks for."""

    name: str
    project: str
    gelu: Literal["erf", "tanh"] | None
    rules: tuple[Rule, ...]
    layer_norm_rules: tuple[Rule, ...] = ()  # go before `rules` where the network has layer norms
    norm_words: dict[str, str] = field(default_factory=lambda: _TORCH_NORM)
    extras: tuple[tuple[str, str], ...] = ()  # (pattern of a name in the file, why it is left out)

    def names(self, architecture: Architecture, ours: Iterable[str]) -> dict[str, Name]:
        """Our tensors' names -> theirs. Raises `KeyError` for one that no rule takes."""
        stages = len(architecture.stages)
        rules = (*(self.layer_norm_rules if architecture.norm == "layer" else ()), *self.rules)
        patterns = [(_pattern(rule.ours), rule) for rule in rules]
        return {name: self._name(name, patterns, stages) for name in ours}

    def _name(self, ours: str, patterns: list[tuple[re.Pattern, Rule]], stages: int) -> Name:
        for pattern, rule in patterns:
            match = pattern.fullmatch(ours)
            if match:
                words = match.groupdict()
                if "norm" in words:
                    words["norm"] = self.norm_words[words["norm"]]
                if "s" in words:
                    words["e"], words["g"] = ("1", "2") if stages == 1 else 2 * (str(int(words["s"]) + 4 - stages),)
                return Name(rule.theirs.format(**words), rule.trailing_axes, rule)
        raise KeyError(ours)

    def reason_to_leave_out(self, theirs: str) -> str | None:
        """Why a tensor of the file that the model lacks is no loss; None: there is no such reason."""
        return next((reason for pattern, reason in self.extras if re.fullmatch(pattern, theirs)), None)


def _pattern(template: str) -> re.Pattern:
    """A template as a pattern with a group for each placeholder."""
    groups = {"s": r"\d+", "b": r"\d+", "norm": "|".join(_TORCH_NORM), "layer": r"\w+", "param": r"\w+"}
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>{groups[part]})" for i, part in enumerate(parts))
    )


_BLOCK = "stages.{s}.blocks.{b}"
_BIAS_TABLE = Rule(f"{_BLOCK}.attn.branch.position_bias.table", "stage{g}.{b}.attn.relative_position_bias_table")

TIMM = Layout(
    name="timm",
    project="timm",
    gelu="erf",
    rules=(
        Rule("stem.0.weight", "stem.0.weight"),
        Rule("stem.1.{norm}", "stem.1.{norm}"),
        Rule("stages.{s}.embed.proj.{param}", "patch_embed{e}.proj.{param}"),
        Rule("stages.{s}.embed.norm.{norm}", "patch_embed{e}.norm.{norm}"),
        Rule("stages.{s}.pos_embed.weight", "pos_embed{e}"),
        Rule(f"{_BLOCK}.attn.norm.{{norm}}", "stage{g}.{b}.norm1.{norm}"),
        Rule(f"{_BLOCK}.attn.branch.{{layer}}.weight", "stage{g}.{b}.attn.{layer}.weight"),
        Rule(f"{_BLOCK}.mlp.norm.{{norm}}", "stage{g}.{b}.norm2.{norm}"),
        Rule(f"{_BLOCK}.mlp.branch.{{layer}}.weight", "stage{g}.{b}.mlp.{layer}.weight"),
        Rule("norm.{norm}", "norm.{norm}"),
        Rule("head.{param}", "head.{param}"),
    ),
)

AUTHORS = Layout(
    name="authors",
    project="danczs/Visformer",
    gelu="erf",
    rules=(
        Rule("stem.0.weight", "stem.0.weight"),
        Rule("stem.1.{norm}", "stem.1.bn.{norm}"),
        Rule("stages.{s}.embed.proj.{param}", "patch_embed{e}.proj.{param}"),
        Rule("stages.{s}.embed.norm.{norm}", "patch_embed{e}.norm.bn.{norm}"),
        Rule("stages.{s}.pos_embed.weight", "pos_embed{e}"),
        Rule(f"{_BLOCK}.attn.norm.{{norm}}", "stage{g}.{b}.norm1.bn.{norm}"),
        _BIAS_TABLE,
        Rule(f"{_BLOCK}.attn.branch.{{layer}}.weight", "stage{g}.{b}.attn.{layer}.weight"),
        Rule(f"{_BLOCK}.mlp.norm.{{norm}}", "stage{g}.{b}.norm2.bn.{norm}"),
        Rule(f"{_BLOCK}.mlp.branch.{{layer}}.weight", "stage{g}.{b}.mlp.{layer}.weight"),
        Rule("norm.{norm}", "norm.bn.{norm}"),
        Rule("head.{param}", "head.{param}"),
    ),
    layer_norm_rules=(
        Rule(f"{_BLOCK}.attn.norm.{{param}}", "stage{g}.{b}.norm1.{param}", trailing_axes=2),
        Rule(f"{_BLOCK}.mlp.norm.{{param}}", "stage{g}.{b}.norm2.{param}", trailing_axes=2),
        Rule("norm.{param}", "norm.{param}", trailing_axes=2),
    ),
    extras=(
        (r"stage\d\.\d+\.attn\.relative_position_index", "follows from the window's size"),
        (r"stage\d\.\d+\.attn_mask", "follows from the sizes of image and window"),
    ),
)

# The authors' code of 2021, whose layer norms worked, wrapped them.
AUTHORS_2021 = replace(
    AUTHORS,
    layer_norm_rules=(
        Rule(f"{_BLOCK}.attn.norm.{{param}}", "stage{g}.{b}.norm1.ln.{param}"),
        Rule(f"{_BLOCK}.mlp.norm.{{param}}", "stage{g}.{b}.norm2.ln.{param}"),
        Rule("norm.{param}", "norm.ln.{param}"),
    ),
)

MINDCV = Layout(
    name="mindcv",
    project="MindCV",
    gelu="tanh",
    norm_words=_MINDSPORE_NORM,
    rules=TIMM.rules,  # with its own words for a norm's tensors, as above
    extras=(
        (
            r"epoch_num|step_num|global_step|learning_rate|weight_decay|momentum|loss_scale|scale_sense|opt_step|"
            r"updates|beta[12]_power|current_iterator_step|last_overflow_iterator_step|random_op\w*|\w+_learning_rate",
            "state of the training",
        ),
    ),
)

OURS = Layout(
    name="visformer",
    project="visformer",
    gelu=None,
    rules=tuple(Rule(rule.ours, rule.ours) for rule in AUTHORS.rules),
    layer_norm_rules=tuple(Rule(rule.ours, rule.ours) for rule in AUTHORS.layer_norm_rules),
)

LAYOUTS = {layout.name: layout for layout in (MINDCV, AUTHORS, TIMM, OURS)}
