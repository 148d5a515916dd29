"""What of an answer in words counts when two are compared."""

import re
import string

# Quotation marks that count as punctuation besides ASCII's.
PUNCTUATION = re.escape(string.punctuation + "‘’´`")
_PUNCTUATION = re.compile(f"[{PUNCTUATION}]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces."""
    text = _PUNCTUATION.sub(" ", text.replace("_", " ").lower())
    return " ".join(_ARTICLES.sub(" ", text).split())
