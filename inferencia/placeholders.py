"""Keys that stand in examples and must never open anything.

Whoever copies an example file and forgets to fill in a key would otherwise run a
server whose key the whole world can read. So the texts which example files, READMEs
and generators put where a key belongs are known here: ours, and those of the two
programs whose files we load.
"""

# As they stand in the predecessors' READMEs, letter by letter.
_EXAMPLES = frozenset({"sk-key1", "sk-key2", "sk-key3"})

# Words that ask a person to do something. Matched without regard to case, and with
# "_" and blanks as "-". None is likely in a random key: the shortest, "changeme", is
# expected once in 10^12 random base64 keys of 32 characters.
_BEGINNINGS = ("please", "sk-please", "sk-your-", "your-")
_WORDS = (
    "please-set",
    "change-me",
    "changeme",
    "paste-your",
    "your-api-key",
    "your-secret",
)


def is_placeholder(secret: str) -> bool:
    """Whether ``secret`` is an example's text that somebody forgot to replace."""
    text = secret.strip().lower()
    if text in _EXAMPLES:
        return True
    text = "-".join(text.replace("_", " ").replace("-", " ").split())
    return text.startswith(_BEGINNINGS) or any(word in text for word in _WORDS)
