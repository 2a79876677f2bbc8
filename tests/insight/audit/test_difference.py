"""Runs of difference, against texts whose differences are known."""

from random import Random

from impala_vllm.insight.audit import difference


def test_runs_put_into_the_old_text_give_the_new_one():
    random = Random(5)
    for _ in range(300):
        old = " ".join(random.choice(("alpha", "beta", "gamma", "é", "7", "\n")) for _ in range(random.randrange(80)))
        new = old
        for _ in range(random.randrange(4)):
            at = random.randrange(len(new) + 1)
            new = new[:at] + random.choice(("", "X", " and something else ", "2026")) + new[at + random.randrange(9) :]
        found = list(difference.runs(old, new))
        assert bool(found) == (old != new)
        rest, made = old, ""
        for run in found:
            lead = len(made)
            same = run.start - lead
            assert rest[:same] == new[lead : run.start]
            assert rest[same:].startswith(run.old)
            made += rest[:same] + run.new
            rest = rest[same + len(run.old) :]
        assert made + rest == new


def test_shared_characters_are_what_both_begin_with():
    random = Random(6)
    for _ in range(300):
        same = "".join(random.choice("ab ") for _ in range(random.randrange(500)))
        assert difference.shared_chars(f"{same}x{same}", f"{same}y") == len(same)
        assert difference.shared_chars(same, same + "x") == len(same)
