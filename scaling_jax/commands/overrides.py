"""The type of the trailing `section.key=value` arguments that change a config."""

from typing import Annotated

from cyclopts import Parameter

Overrides = Annotated[str, Parameter(help="Changes to the config: section.key=value")]
