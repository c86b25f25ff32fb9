"""The options of `train`: one for every field of a recipe."""

from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_origin

from cyclopts import Group, Parameter

from unrolled.recipe import FIELDS, SECTIONS, load_recipe

SHORT_FORMS = {
    "data.encoding": ["--encoding"],
    "training.max_epochs": ["--max-epochs"],
    "training.seed": ["--seed"],
    "training.device": ["--device"],
    "training.precision": ["--precision"],
    "training.sample_every": ["--sample-every"],
}


def _recipe_options() -> type:
    """One option for every field of a recipe, `--training.num-steps` and the like, with the field's own help."""
    groups = {
        name: Group(f"{name.capitalize()}: {(section.__doc__ or '').strip()}", sort_key=number)
        for number, (name, section) in enumerate(SECTIONS.items(), start=1)
    }
    options, demo = [], load_recipe("demo")
    for dotted in FIELDS:
        section, _, name = dotted.partition(".")
        about = SECTIONS[section].model_fields[name]
        choices = get_args(about.annotation) if get_origin(about.annotation) is Literal else ()
        default = getattr(getattr(demo, section), name)
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        parameter = Parameter(
            name=["--" + dotted.replace("_", "-"), *SHORT_FORMS.get(dotted, [])],
            help=f"{about.description} [{', '.join(choices) + '; ' * bool(choices)}demo: {default}]",
            group=groups[section],
        )
        options.append((dotted.replace(".", "__"), Annotated[str | None, parameter], field(default=None)))
    made = make_dataclass("RecipeOptions", options)
    made.__module__ = __name__
    return made


if TYPE_CHECKING:

    class RecipeOptions: ...
else:
    RecipeOptions = _recipe_options()
