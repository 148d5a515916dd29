"""`i/n` on the command line: machine i of n."""

import re

from scaling_jax.errors import UserError


def parse(text: str, option: str) -> tuple[int, int]:
    """ "2/8" as (1, 8).

    Raises:
      UserError: naming the `option`, if it is anything else.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]) - 1, int(match[2])
    raise UserError(f"{option}={text}: give i/n, from 1/n to n/n")
