"""`make demo` ends well here, and does not when results differ."""

from __future__ import annotations

import demo


def test_the_demo_agrees_and_says_so(capsys):
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert "everything agrees" in shown
    for device in demo.DEVICES:
        assert device in shown


def test_wrong_tokens_fail_the_demo(monkeypatch, capsys):
    monkeypatch.setattr(demo, "generate_eager", lambda model, prompt, n: list(range(n)))
    monkeypatch.setattr(demo, "what_if", lambda models: None)
    assert demo.main() == 1
    assert "differ from eager generation" in capsys.readouterr().out


def test_wrong_embeddings_fail_the_demo(monkeypatch, capsys):
    whole = demo.minilm.embed
    calls = []

    def embed(*args):
        calls.append(1)
        return whole(*args) * (1.0 if len(calls) == 1 else 1.001)

    monkeypatch.setattr(demo.minilm, "embed", embed)
    monkeypatch.setattr(demo, "run_engine", lambda platform, model: [])
    monkeypatch.setattr(demo, "what_if", lambda models: None)
    assert demo.main() == 1
    assert "MiniLM embeddings differ" in capsys.readouterr().out


def test_a_control_that_changes_nothing_fails_the_demo(monkeypatch, capsys):
    monkeypatch.setattr(demo, "negative_controls", lambda spec: {"nothing changed": spec})
    monkeypatch.setattr(demo, "run_minilm", lambda model, tokenizer: [])
    monkeypatch.setattr(demo, "what_if", lambda models: None)
    assert demo.main() == 1
    assert "changed no token" in capsys.readouterr().out
