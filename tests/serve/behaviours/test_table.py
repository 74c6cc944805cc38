"""The behaviours A to K that the serving specification asks for, each with the tests that bear its name.

A. Lifecycle
  A1  /health is 503 while loading and 200 when ready
  A2  SIGTERM lets what runs finish and refuses what is new with 503
  A3  what does not finish in time ends with an error; with no time at all the process is gone within 4 s
  A4  no child process is left, and the exit code is 0
  A5  a second SIGTERM stops at once
  A6  after kill -9 the same command works again, on the same port and cache folder
  A7  files and sockets of a killed server are cleaned up
  A8  the death of the engine ends every stream with an error and shows at /health
  A9  kill -9 of the engine's process: within 2 s, and the server recovers or exits as configured
B. Cancelling
  B1  closing a stream frees slot and pages within a step
  B2  and so does leaving before a whole answer
  B3  while the request still waits
  B4  while a picture is being read
  B5  (while keys and values move between machines: there is one machine here)
  B6  a hundred who connect and leave cost nothing
  B7  who leaves does not change a neighbour's tokens
C. What must be the same
  C1  a stream put together is the whole answer
  C2  one seed gives one answer
  C3  greedy answers do not depend on the batch
  C4  a cached prompt gives the same answer, and says how much was cached
  C5  n choices are distinct
  C6  log-probabilities add up to what is reported
  C7  stop strings across tokens cut, and are not shown
  C8  usage counts pictures and equals the count endpoint
  C9  a picture by data URL, http URL and file gives one answer, bit for bit
  C10 one text with two pictures never shares keys and values
  C11 what was read of a picture survives a restart
D. Bad input is a 4xx with an envelope, and no insides
  D1  no JSON            D2  an array            D3  wrong types       D4  unknown role
  D5  no messages        D6  schema without one  D7  bad regex/grammar D8  recursive or endlessly deep schema
  D9  bias out of range  D10 too many stops      D11 max_tokens 0, -1, huge     D12 temperature NaN
  D13 n huge             D14 unknown model       D15 malformed tools   D16 lone surrogates, invalid UTF-8
  D17 zero bytes         D18 50 MB of text       D19 control words typed by a user
  D20 a picture in the system message
E. Media
  E1  malformed base64   E2  wrong type          E3  404               E4  a page of HTML
  E5  JPEG cut off       E6  1x1                 E7  1x10000           E8  16 bits
  E9  CMYK               E10 palette             E11 transparency      E12 EXIF rotation
  E13 animated GIF, WebP E14 SVG                 E15 PNG bomb          E16 zTXt and iCCP bombs
  E17 TIFF, JPEG 2000    E18 a hundred pictures  E19 budget of a request       E20 a site that drips
  E21 redirect loop      E22 redirect to private addresses, however spelled    E23 names that resolve to them
  E24 files outside the root, and dots           E25 video of 0 frames E26 of one frame
  E27 of an hour         E28 of uneven rate      E29 without a video stream
F. Too much
  F1  a full queue is 429 with Retry-After, quickly
  F2  a prompt over the context is 400 context_length_exceeded, streamed or whole
  F3  an answer ends with the context, finish_reason length
  F4  when pages run out requests are set back and finish later
  F5  memory stays bounded over a soak
  F6  under memory pressure vision weights go first
  F7  a full disk costs the cache alone
G. Slow clients
  G1  a reader that stands still blocks nobody   G2  comments during a long silence
  G3  half-open connections are dropped          G4  pipelining        G5  Connection: close
  G6  two hundred idle streams
H. Thinking
  H1  a budget is kept to the token, closed once H2  budget 0 is none  H3  off is none
  H4  split anywhere, the same                   H5  control words in a user's text
  H6  max_tokens inside the thinking is length and no error            H7  a grammar binds the answer alone
I. Tools
  I1  required and named calls are valid at any temperature            I2  parallel calls
  I3  deltas put together are the call           I4  any script        I5  no tag leaks
J. Security
  J1  keys: none, wrong, right, the second       J2  constant time     J3  the policy of /metrics
  J4  CORS closed        J5  no prompt in logs   J6  no header by a request id         J7  no log line forged
K. Metrics
  K1  the names exist    K2  counters never fall K3  successes are requests    K4  gauges return to 0
  K5  histograms finite  K6  no label is a client's
"""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = sorted(set(re.findall(r"\b([A-K]\d+)  ?\S", __doc__)), key=lambda row: (row[0], int(row[1:])))
ELSEWHERE = {"B5": None, "F6": "tests/checkpoints/test_residency.py"}


def named_tests():
    """Which rows each test function says it is about: test_A6_A7_..., and D3_to_D15 for a range."""
    found = {}
    for path in HERE.parent.rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE):
            rows = re.match(r"test_((?:[A-K]\d+_|to_)+)", name)
            if rows:
                words = rows[1].strip("_").split("_")
                for place, word in enumerate(words):
                    if word == "to":
                        first, last = words[place - 1], words[place + 1]
                        numbers = range(int(first[1:]), int(last[1:]) + 1)
                        words += [f"{first[0]}{number}" for number in numbers]
                for word in words:
                    found.setdefault(word, []).append(name)
    return found


def test_the_table_is_whole():
    assert len(ROWS) == len(set(ROWS)) and {row[0] for row in ROWS} == set("ABCDEFGHIJK")
    for letter in "ABCDEFGHIJK":
        numbers = [int(row[1:]) for row in ROWS if row[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), letter
    assert set(named_tests()) - {"to"} <= set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_each_behaviour_has_a_test_of_its_name(row):
    if row in ELSEWHERE:
        place = ELSEWHERE[row]
        assert place is None or (HERE.parents[2] / place).is_file()
    else:
        assert named_tests().get(row), f"no test is named test_{row}_..."
