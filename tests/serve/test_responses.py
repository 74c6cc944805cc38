"""The Responses dialect, and the OpenAPI document that is made from the code."""

import base64
import json
import re
from hashlib import sha256

from duomo.serve.backend import Piece, ToolPiece
from duomo.serve.items import Items, items_of
from duomo.serve.respond import Answer
from tests.serve.conftest import picture_url

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}


def events(server, body):
    with server.client.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]


def test_whole_and_streamed_agree(server):
    for body in (
        {"input": "hi"},
        {"input": "hi", "reasoning": {"effort": "none"}},
        {"input": "hi", "max_output_tokens": 5},
    ):
        whole = server.client.post("/v1/responses", json=body).json()
        got = events(server, body)
        assert [e["sequence_number"] for e in got] == list(range(len(got)))
        assert got[0]["type"] == "response.created" and got[-1]["type"] == f"response.{whole['status']}"
        last = got[-1]["response"]
        assert last["usage"] == whole["usage"]
        strip = lambda items: [{k: v for k, v in i.items() if k != "id"} for i in items]  # noqa: E731
        assert strip(last["output"]) == strip(whole["output"])
        text = "".join(e["delta"] for e in got if e["type"] == "response.output_text.delta")
        assert text == next((i["content"][0]["text"] for i in whole["output"] if i["type"] == "message"), "")
        added = [e["output_index"] for e in got if e["type"] == "response.output_item.added"]
        done = [e["output_index"] for e in got if e["type"] == "response.output_item.done"]
        assert added == done == list(range(len(whole["output"])))


def test_tools_pictures_and_what_needs_a_store(server):
    body = {"input": "hi", "tools": [TOOL], "tool_choice": "required"}
    call = server.client.post("/v1/responses", json=body).json()["output"][-1]
    assert call["type"] == "function_call" and json.loads(call["arguments"]) == {"text": "脚本"}
    got = events(server, body)
    assert got[-1]["response"]["output"][-1]["name"] == "look"
    deltas = [e for e in got if e["type"] == "response.function_call_arguments.delta"]
    assert [e["delta"] for e in deltas] == ['{"text"', ': "脚本"', "}"]  # as they were made
    item = next(e for e in got if e["type"] == "response.output_item.added" and "call_id" in e["item"])
    assert item["item"]["arguments"] == "" and item["item"]["status"] == "in_progress"
    assert {(e["item_id"], e["output_index"]) for e in deltas} == {(item["item"]["id"], item["output_index"])}
    done = next(e for e in got if e["type"] == "response.function_call_arguments.done")
    assert json.loads(done["arguments"]) == {"text": "脚本"} and done["name"] == "look"
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "a cat"}
    content = [{"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": picture_url()}]
    history = [{"role": "user", "content": content}, call, result]
    got = server.client.post("/v1/responses", json={"input": history})
    assert got.status_code == 200 and got.json()["usage"]["input_tokens_details"]["image_tokens"] == 64
    for wrong in ({"previous_response_id": "x"}, {"background": True}, {"input": [{"type": "nonsense"}]}):
        assert server.client.post("/v1/responses", json={"input": "x", **wrong}).status_code == 400


def test_a_withdrawn_call_closes_and_is_left_out_of_the_response():
    items, answer = Items("job"), Answer()
    pieces = [
        Piece(text="I look. "),
        Piece(tools=(ToolPiece(0, "call_0", "look"), ToolPiece(0, arguments='{"at": '))),
        Piece(tools=(ToolPiece(1, "call_1", "touch", "{}"),)),
        Piece(tools=(ToolPiece(0, is_broken=True),), text='look{"at": nothing'),
        Piece(tools=(ToolPiece(2, "call_2", "smell"), ToolPiece(2, is_broken=True))),  # in one breath
    ]
    told = []
    for piece in pieces:
        answer.add(piece)
        told += items.add(piece)
    output = items.in_order(items_of("job", answer))
    told += items.close(output)
    assert [item["id"] for item in output] == ["msg_job", "fc_job_1"]
    added = {f["item"]["id"]: f["output_index"] for name, f in told if name == "output_item.added"}
    assert added == {"msg_job": 0, "fc_job_0": 1, "fc_job_1": 2, "fc_job_2": 3}
    ended = {f["item"]["id"]: f["item"]["status"] for name, f in told if name == "output_item.done"}
    assert ended == {
        "fc_job_0": "incomplete", "fc_job_2": "incomplete", "msg_job": "completed", "fc_job_1": "completed"
    }  # fmt: skip


def test_the_document_names_every_route_and_resolves(server):
    from duomo.serve.app import routes
    from duomo.serve.options import Options

    document = server.client.get("/openapi.json").json()
    ours = {r.path.replace(":path", "") for r in routes(Options())}
    assert ours - set(document["paths"]) == {"/", "/ui/{name}", "/docs", "/openapi.json"}
    assert set(document["paths"]) <= ours
    text = json.dumps(document)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in document["components"]["schemas"]


def test_the_docs_say_all_of_the_document_and_ask_no_other_host(start):
    server = start(page=False)  # of whose files nothing is needed
    document, page = server.client.get("/openapi.json").json(), server.client.get("/docs")
    assert page.status_code == 200 and "<script" not in page.text and "//" not in page.text
    policy = page.headers["content-security-policy"]
    style = page.text.partition("<style>")[2].partition("</style>")[0]
    assert (
        "default-src 'none'" in policy
        and base64.b64encode(sha256(style.encode()).digest()).decode() in policy
    )
    for path in document["paths"]:
        assert f" {path}</code></h2>" in page.text, path
    for name, schema in document["components"]["schemas"].items():
        assert f"<h2 id='{name}'>" in page.text
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in page.text, (name, field)
    links = set(re.findall(r"<a href='#(\w+)'>", page.text))
    assert links and links <= set(document["components"]["schemas"])
