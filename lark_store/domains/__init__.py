"""Synthetic domains: related statements about invented words, to ask what a model learns from each of them.

templates   the statements of each domain by their role, and what is asked of their measured influence
words       invented words
generate    draws of a domain as rows of a source
"""

from lark_store.domains.generate import make_domain
from lark_store.domains.templates import DOMAINS, Contrast, Domain

__all__ = ["DOMAINS", "Contrast", "Domain", "make_domain"]
