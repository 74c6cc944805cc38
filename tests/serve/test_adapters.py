"""Adapters over HTTP: vLLM's two endpoints, held under one folder, and their names as models."""

import json

import pytest


@pytest.fixture
def root(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "adapter_config.json").write_text(json.dumps({"r": 4}))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "adapter_config.json").write_text("{}")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "empty").mkdir()
    return tmp_path / "root"


def load(server, name, path, **more):
    return server.client.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more}
    )


def unload(server, name):
    return server.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def names(server):
    return [card["id"] for card in server.client.get("/v1/models").json()["data"]]


def test_an_adapter_is_loaded_listed_chosen_and_unloaded(start, root):
    server = start(lora_root=str(root), served_model_name=("ernie",))
    done = load(server, "mine", root / "one")
    assert done.status_code == 200 and "mine" in done.text
    assert load(server, "other", "two").status_code == 200  # a path may be relative to the folder
    assert names(server) == ["ernie", "mine", "other"]
    card = server.client.get("/v1/models/mine").json()
    assert (card["parent"], card["root"]) == ("ernie", "one")
    seen = []
    stream = server.backend.stream
    server.backend.stream = lambda job: seen.append(job.adapter) or stream(job)
    for model in ("mine", "ernie", "default", "other"):
        assert server.ask(model=model).status_code == 200
    post = server.client.post
    assert post("/v1/completions", json={"model": "mine", "prompt": "x"}).status_code == 200
    assert post("/v1/responses", json={"model": "mine", "input": "x"}).status_code == 200
    body = {"model": "mine", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    assert post("/v1/messages", json=body).status_code == 200
    assert seen == ["mine", "", "", "other", "mine", "mine", "mine"]
    assert load(server, "mine", "two").json()["error"]["code"] == "adapter_loaded"
    assert load(server, "mine", "two", load_inplace=True).status_code == 200
    assert server.backend.adapters["mine"] == (root / "two").resolve()
    assert unload(server, "mine").status_code == 200
    assert server.ask(model="mine").status_code == 404 and names(server) == ["ernie", "other"]
    assert unload(server, "mine").json()["error"]["code"] == "adapter_not_found"


@pytest.mark.parametrize(
    "path, code",
    [
        ("link", "adapter_refused"), ("../outside", "adapter_refused"), ("/etc", "adapter_refused"),
        ("/no/such/place", "adapter_refused"), (".", "adapter_refused"), ("empty", "adapter_not_found"),
        ("three", "adapter_not_found"), ("a\0b", "invalid_value"), ("x" * 1000, "adapter_not_found"),
    ],
)  # fmt: skip
def test_only_what_lies_under_the_folder_is_loaded(start, root, path, code):
    server = start(lora_root=str(root))
    refused = load(server, "mine", path)
    assert 400 <= refused.status_code < 500 and refused.json()["error"]["code"] == code, refused.text
    assert str(root) not in refused.text and names(server) == ["duomo"]


def test_without_the_flag_nothing_is_loaded_and_names_are_plain(start, root):
    off = start()
    assert load(off, "mine", root / "one").json()["error"]["code"] == "adapters_off"
    on = start(lora_root=str(root))
    for name in ("a b", "../x", "", "duomo", "default"):
        assert load(on, name, "one").status_code == 400, name


def test_an_adapter_changes_what_a_real_model_says_and_unloading_undoes_it(folder, start, tmp_path):
    import asyncio

    from duomo.checkpoints import load_config
    from duomo.serve.engine import open_backend
    from duomo.serve.options import Options
    from tests.engine.test_adapters import write_adapter
    from tests.serve.conftest import GREEDY

    write_adapter(tmp_path / "root" / "mine", load_config(folder))
    (tmp_path / "root" / "bad").mkdir()
    (tmp_path / "root" / "bad" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    options = Options(model=str(folder), lora_root=str(tmp_path / "root"), thinking="off", kv_mb=64)
    backend = asyncio.run(open_backend(options))
    try:
        server = start(backend, model=str(folder), lora_root=options.lora_root, thinking="off")
        say = lambda model: server.ask(model=model, logprobs=True, **GREEDY).json()["choices"]  # noqa: E731
        plain = say("")
        assert load(server, "mine", "mine").status_code == 200
        mine = say("mine")
        assert mine != plain == say("") and mine == say("mine")
        refused = load(server, "bad", "bad")
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_checkpoint"
        assert unload(server, "mine").status_code == 200 and say("") == plain
    finally:
        asyncio.run(backend.close())
