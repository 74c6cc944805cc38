"""One answer as it grows: governor, grammar, sampler and stops asked in that order, token by token.

Stop strings, stop ids, min_tokens and the grammar look at the answer alone; the thinking before it is bound
by its budget. `cause` names what ended the answer, more precisely than a finish reason can.
"""

from __future__ import annotations

import codecs
import zlib

import numpy as np
import numpy.typing as npt

from duomo.engine.governor import Governor
from duomo.engine.grammar import Grammar
from duomo.engine.request import FinishReason, Request, TokenLogprob
from duomo.engine.sampler import Sampler, token_logprob
from duomo.engine.stops import StopMatcher
from duomo.engine.vocabulary import Vocabulary


class Answer:
    """GrammarError on construction if the constraint cannot be used."""

    def __init__(self, request: Request, vocabulary: Vocabulary, max_tokens: int = 1) -> None:
        params = request.params
        self._params, self._vocabulary, self.max_tokens = params, vocabulary, max_tokens
        seed = zlib.crc32(request.request_id.encode()) if params.seed is None else params.seed
        self._sampler = Sampler(params, request.ids, seed, _bad_words(params.bad_words, vocabulary))
        self._grammar = Grammar(params.constraint, vocabulary) if params.constraint else None
        wrap_up = vocabulary.encode(params.wrap_up) if params.wrap_up else []
        self.governor = Governor(request.is_thinking, vocabulary.think_end, params.thinking_budget, wrap_up)
        self._stops = StopMatcher(params.stop)
        self._is_opening = self.governor.is_thinking  # newlines after the thinking are the template's
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.num_tokens = 0
        self.num_reasoning = 0
        self.finish_reason: FinishReason | None = None
        self.cause = ""
        self._is_greedy = self._sampler.is_greedy and self._grammar is None
        self._ends = frozenset((*vocabulary.eos_ids, *params.stop_token_ids))
        self._reads_text = self._grammar is not None or bool(params.stop)
        self._token_ids: list[int] = []  # not yet reported
        self._logprobs: list[TokenLogprob] = []

    def step(self, logits: npt.NDArray[np.float32], likeliest: int | None = None) -> int:
        """Draws the next token from its logits [V] and takes it in. `likeliest`: their argmax, if known."""
        forced, governor = self._params.forced, self.governor
        token = None
        if self.num_tokens < len(forced):
            token = forced[self.num_tokens]
        elif governor.is_thinking:
            token = governor.next_token()
        if token is None:
            token = governor.replace(self._draw(logits, likeliest), self._vocabulary.eos_ids)
        if self._params.logprobs is not None:
            self._logprobs.append(token_logprob(logits, token, self._params.logprobs))
        self._accept(token)
        return token

    def take_new(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Tokens drawn since the last call, with their log-probabilities where asked for."""
        taken = tuple(self._token_ids), tuple(self._logprobs)
        self._token_ids.clear()
        self._logprobs.clear()
        return taken

    def _draw(self, logits: npt.NDArray[np.float32], likeliest: int | None) -> int:
        params, is_thinking = self._params, self.governor.is_thinking
        may_not_end = params.ignore_eos or (not is_thinking and self.num_tokens < params.min_tokens)
        if self._is_greedy and likeliest is not None and not (may_not_end and likeliest in self._ends):
            return likeliest
        banned: list[int] = []
        if may_not_end:
            banned = list(self._ends)
        if not is_thinking and self._vocabulary.think_end is not None and self._grammar is not None:
            banned.append(self._vocabulary.think_end)
        allowed = None
        if self._grammar is not None and not is_thinking:
            allowed = self._grammar.allowed()
            if not allowed.any() or (banned and not np.delete(allowed, banned).any()):
                banned = []  # a finished grammar outweighs min_tokens
        return self._sampler.draw(logits, banned, allowed)

    def _accept(self, token: int) -> None:
        was_thinking = self.governor.is_thinking
        if was_thinking:
            self.governor.accept(token)
        if not self._is_greedy:
            self._sampler.accept(token)
        self.num_tokens += 1
        self._token_ids.append(token)
        if was_thinking:
            self.num_reasoning += token != self._vocabulary.think_end
        elif token in self._ends or self._reads_text:
            self._look_for_the_end(token)
        if self.finish_reason is None and self.num_tokens >= self.max_tokens:
            self._finish("length", "length")

    def _look_for_the_end(self, token: int) -> None:
        params = self._params
        is_early = self.num_tokens <= params.min_tokens
        if token in self._vocabulary.eos_ids and not params.ignore_eos:
            return self._finish("stop", "eos")
        if token in params.stop_token_ids and not is_early:
            return self._finish("stop", "stop_id")
        if self._grammar is not None:
            self._grammar.advance(token)
            if self._grammar.is_over:
                return self._finish("stop", "grammar")
        if params.stop and token not in self._vocabulary.special_ids:
            text = self._decoder.decode(self._vocabulary.tokens[token])
            if self._is_opening:
                text = text.lstrip("\n")
                self._is_opening = not text
            self._stops.feed(text)
            if self._stops.found is not None:
                return self._finish("stop", "stop_string")
        return None

    def _finish(self, reason: FinishReason, cause: str) -> None:
        self.finish_reason, self.cause = reason, cause


def _bad_words(words: tuple[str, ...], vocabulary: Vocabulary) -> list[tuple[int, ...]]:
    """Each word as it is encoded at the start of a text and after a blank."""
    spelled = {tuple(vocabulary.encode(form)) for word in words for form in (word, " " + word.lstrip())}
    return [ids for ids in spelled if ids]
