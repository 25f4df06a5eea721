"""Ends an answer at the first of some strings, which does not become part of it."""


class StopStrings:
    """Holds back the end of a text as long as it may be the beginning of a stop string.

    `found`: a stop string came. `length`: characters of the text before it.
    """

    def __init__(self, strings: tuple[str, ...]):
        self.found = False
        self.length = 0
        self._strings = strings
        self._held = ""

    def put(self, text: str) -> str:
        """The text that is now certain, after `text` has been added."""
        self._held += text
        places = [at for each in self._strings if (at := self._held.find(each)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        begun = max(map(self._begun, self._strings), default=0)
        return self._release(len(self._held) - begun)

    def finish(self) -> str:
        """The rest of the text. Empty after a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _begun(self, string: str) -> int:
        """How many of the first characters of a stop string end the text."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)

    def _release(self, count: int) -> str:
        certain = self._held[:count]
        self._held = self._held[count:]
        self.length += count
        return certain
