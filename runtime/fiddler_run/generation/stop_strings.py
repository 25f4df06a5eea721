"""Ends an answer at the first of some strings, which does not become part of it."""


class StopStrings:
    """Holds back the end of a text as long as it may be the beginning of a stop string.

    `found`: a stop string came, with which `held`, the rest, begins.
    """

    def __init__(self, strings: tuple[str, ...]):
        self.found = False
        self._strings = strings
        self.held = ""

    def put(self, text: str) -> str:
        """The text that is now certain, after `text` has been added."""
        self.held += text
        places = [at for each in self._strings if (at := self.held.find(each)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        begun = max(map(self._begun, self._strings), default=0)
        return self._release(len(self.held) - begun)

    def finish(self) -> str:
        """The rest of the text. Empty after a stop string."""
        return "" if self.found else self._release(len(self.held))

    def _begun(self, string: str) -> int:
        """How many of the first characters of a stop string end the text."""
        longest = min(len(string) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(string[:n])), 0)

    def _release(self, count: int) -> str:
        certain = self.held[:count]
        self.held = self.held[count:]
        return certain
