from duomo.train.experiments.curve import plot, read_log

LOG = """4096 ids in the vocabulary
looking 20/40 loss 4.008 right 2.5 % 89 pictures/s, CPU 0.7 min, 21 min left
finding 20/40 loss 0.213 right 93.8 % 30 pictures/s, CPU 2.1 min, 28 min left
  dev: charts/value 95, digits/sum thinking 78, clips/event 17
finding 40/40 loss 0.168 right 94.9 % 31 pictures/s, CPU 3.8 min, 0 min left
"""


def test_a_log_as_rows_with_what_was_spent_before():
    rows = read_log(LOG, 100.0)
    assert [(row["stage"], row["step"], row["minutes"]) for row in rows] == [
        ("looking", 20, 100.7),
        ("finding", 20, 102.1),
        ("finding", 40, 103.8),
    ]
    assert rows[1]["dev"] == {"charts/value": 95, "digits/sum thinking": 78, "clips/event": 17}
    assert "dev" not in rows[2] and rows[2]["loss"] == 0.168


def test_the_curve_is_a_picture(tmp_path):
    plot(read_log(LOG, 0.0), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
