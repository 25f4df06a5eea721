"""Decides how many tokens prompt lookup may propose, so that decode is not slower with it.

A pass with n proposed tokens yields 1 to n + 1 of them and takes longer than a plain step. The gate
measures both: how often proposals are right, and the time of passes of each length.
"""

DRAFT_TOKENS = (2, 4, 8, 16)
STEPS_PER_TOKEN = 0.5  # assumed at most of more tokens in a pass than have been timed
PRIOR = (4.5, 0.5)  # proposed tokens, right and wrong, before any has been checked
MEMORY = 0.84  # weight of what is known of proposals, after one more pass with some
FIRST_CREDIT = 1.5  # plain steps
CREDIT_PER_STEP = 0.02
MAX_CREDIT = 8.0
MIN_STEPS = 4  # plain ones, before the first draft
MAX_DRAFTS = 16  # in a row; a plain step is then timed again
FALL = 0.5  # what delays a pass is seldom its own: averages of times fall faster than they rise
RISE = 0.1
OUTLIER = 3.0  # times the average
FIRST_OUTLIER = 1.5  # times what was assumed before the first pass of a length


class LookupGate:
    """Open while the expected tokens of a pass exceed its cost, in plain steps.

    All times lost by proposals come out of a credit, which grows by 2% of the time of plain steps
    and by what other proposals saved. A closed gate lets the shortest draft through once plain
    steps since the last one have paid for it.
    """

    def __init__(self):
        self._times_s: dict[int, float] = {}  # by the tokens of a pass
        self._right, self._wrong = PRIOR
        self._credit = FIRST_CREDIT
        self._all_plain_steps = 0
        self._plain_steps = 0  # since the last draft
        self._drafts = 0  # since the last plain step

    def cost(self, tokens: int) -> float:
        """The time of a pass of `tokens`, in plain steps."""
        if tokens == 1:
            return 1.0
        times = self._times_s
        if tokens in times:
            return times[tokens] / times[1]
        shorter = max((length for length in times if length < tokens), default=1)
        longer = min((length for length in times if length > tokens), default=None)
        known = self.cost(shorter)
        slope = STEPS_PER_TOKEN
        if shorter > 1:  # more tokens share more experts: the next ones cost less
            slope = min(slope, (known - 1) / (shorter - 1))
        assumed = known + slope * (tokens - shorter)
        return assumed if longer is None else min(assumed, self.cost(longer))

    def expected(self, drafted: int) -> float:
        """The expected number of tokens that a pass with `drafted` proposed tokens yields."""
        chance = self._right / (self._right + self._wrong)
        return sum(chance**place for place in range(drafted + 1))

    @property
    def is_open(self) -> bool:
        """True if a draft of any length is expected to pay."""
        return any(self._gain(drafted) > 1 for drafted in DRAFT_TOKENS)

    def draft_tokens(self) -> int:
        """The number of tokens to propose at most, if a match is found."""
        if self._all_plain_steps < MIN_STEPS or self._drafts == MAX_DRAFTS:
            return 0
        within = [each for each in DRAFT_TOKENS if self._risk(each) <= self._credit]
        paying = [each for each in within if self._gain(each) > 1]
        if paying:
            untimed = next((each for each in paying if each + 1 not in self._times_s), None)
            return untimed or max(paying, key=self._gain)
        shortest = DRAFT_TOKENS[0]
        waited = CREDIT_PER_STEP * self._plain_steps >= self._risk(shortest)
        return shortest if shortest in within and waited else 0

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """Learns from a pass in which `accepted` of `drafted` proposed tokens were right."""
        self._time(drafted + 1, seconds)
        if drafted == 0:
            self._all_plain_steps += 1
            self._plain_steps += 1
            self._drafts = 0
            earned = CREDIT_PER_STEP
        else:
            earned = accepted + 1 - self.cost(drafted + 1)
            self._judge(drafted, accepted)
            self._plain_steps = 0
            self._drafts += 1
        self._credit = min(self._credit + earned, MAX_CREDIT)

    def _judge(self, drafted: int, accepted: int) -> None:
        if not self.is_open and accepted == drafted:
            self._right, self._wrong = PRIOR  # another text has begun
        self._right = MEMORY * self._right + accepted
        self._wrong = MEMORY * self._wrong + (accepted < drafted)

    def _time(self, tokens: int, seconds: float) -> None:
        before = self._times_s.get(tokens, seconds)
        if tokens not in self._times_s and tokens > 1:
            assumed_s = self.cost(tokens) * self._times_s[1]
            self._times_s[tokens] = min(seconds, FIRST_OUTLIER * assumed_s)
        elif tokens == 1 and self._all_plain_steps < MIN_STEPS:
            self._times_s[1] = min(before, seconds)  # the first steps also record tapes
        else:
            rate = FALL if seconds < before else RISE
            self._times_s[tokens] = before + rate * (min(seconds, OUTLIER * before) - before)

    def _gain(self, drafted: int) -> float:
        """Expected tokens in the time of a plain step."""
        return self.expected(drafted) / self.cost(drafted + 1)

    def _risk(self, drafted: int) -> float:
        """The plain steps that are lost if no proposed token is right."""
        return self.cost(drafted + 1) - 1
