"""The directory that a run leaves: a plain Hugging Face model, and what an export needs to compute what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.recipe_file import CODES_NAME, DIMS_NAME, RECIPE_NAME, dims_text, recipe_text
from ryzen_compile.sentence_layout import write_layout
from ryzen_compile.train.distill import DistillComponent
from ryzen_compile.train.dkm_table import DkmComponent
from ryzen_compile.train.matryoshka import MatryoshkaComponent
from ryzen_compile.train.model import save_model
from ryzen_compile.train.table_file import save_table
from ryzen_compile.workflow.exported import trained_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ryzen_compile.numerics.codebook import CodebookTensor
    from ryzen_compile.spec import EncoderSettings
    from ryzen_compile.train.component import Component


def save_trained(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    components: Sequence[Component],
    out: Path,
    dtype: str,
    card: str,
    encoder: EncoderSettings | None = None,
) -> None:
    """Detaches the components and writes ``model`` to ``out``, with ``card`` as its README.md; an ``encoder``
    in the layout of sentence-transformers.

    Beside the weights lie the recipe that they were trained for, if it is a particular one, the dims to which vectors
    can be cut, and a trained table of codes. A draft model says in its generation configuration how many tokens are
    worth drafting.
    """
    recipe = trained_recipe(components)
    dims = [c.depths.dims for c in components if isinstance(c, MatryoshkaComponent) and c.active]
    tables: list[tuple[str, CodebookTensor]] = []
    for component in components:
        if isinstance(component, DkmComponent) and component.active:
            tables.append((component.table_name, component.table()))
        if isinstance(component, DistillComponent) and component.active:
            model.generation_config.num_assistant_tokens = component.draft_length()
    for component in reversed(components):  # the last attached may stand on those before
        component.detach(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def companions(directory: Path) -> None:
        (directory / "README.md").write_text(card, encoding="utf-8")
        if recipe is not None:
            (directory / RECIPE_NAME).write_text(recipe_text(recipe), encoding="utf-8")
        if dims:
            (directory / DIMS_NAME).write_text(dims_text(dims[0]), encoding="utf-8")
        if encoder is not None:
            write_layout(directory, encoder, hidden=model.config.hidden_size)
        for name, tensor in tables:
            save_table(directory / CODES_NAME, name, tensor, parameters[name])

    save_model(model, tokenizer, out, dtype, companions)
