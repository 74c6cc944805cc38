"""Run by the Python of an environment that holds other projects' clients: `suite.py CLIENT URL PICTURE_URL`.

Every check is an assert; the process prints one line for each client and exits 0.
"""

import sys

client, url, picture = sys.argv[1:]
TOOL = {
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
}
SEE = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": picture}}]


def openai():
    import openai

    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in api.models.list()]
    ask = {"model": "duomo", "messages": [{"role": "user", "content": SEE}]}
    whole = api.chat.completions.create(**ask)
    assert whole.choices[0].message.content and whole.choices[0].message.reasoning_content
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    text, usage = "", None
    for chunk in api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content and usage == whole.usage
    off = api.chat.completions.create(**ask, extra_body={"enable_thinking": False})
    assert off.choices[0].message.reasoning_content is None
    tools = [{"type": "function", "function": TOOL}]
    with api.chat.completions.stream(**ask, tools=tools, tool_choice="required") as stream:
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert call.function.name == "look" and call.function.arguments.startswith("{")
    assert api.completions.create(model="duomo", prompt="Once", max_tokens=3).choices[0].text
    answer = api.responses.create(model="duomo", input="hi")
    assert answer.output_text == text
    with api.responses.stream(model="duomo", input="hi") as stream:
        final = stream.get_final_response()
    assert final.output_text == text and final.usage == answer.usage
    flat = {"type": "function", **TOOL}
    with api.responses.stream(model="duomo", input="hi", tools=[flat], tool_choice="required") as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        called = stream.get_final_response().output[-1]
    assert len(deltas) > 1 and "".join(deltas) == called.arguments == call.function.arguments
    if hasattr(api, "decisions"):
        content = [{"type": "input_image", "image_url": picture}]
        like = {"type": "input_text", "text": "It is like this one."}
        questions = [
            {"type": "predicate", "instructions": [like, *content], "name": "red"},
            {"type": "choice", "instructions": "What?", "choices": [{"value": "cat"}, {"value": True}]},
            {"type": "score", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "good"}]},
        ]
        asked = [{"role": "user", "content": content}]
        red, what, how = api.decisions.create(model="duomo", input=asked, questions=questions).answers
        assert (red.name, red.type, what.choice, how.type) == ("red", "predicate", "cat", "score")
        assert abs(sum(row.probability for row in what.probabilities) - 1) < 1e-6
    for wrong, kind in (
        ({"temperature": 9}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
    ):
        try:
            api.chat.completions.create(**{**ask, **wrong})
        except kind as error:
            assert error.code
        else:
            raise AssertionError(wrong)


def anthropic():
    import anthropic

    api = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    ask = {"model": "duomo", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
    whole = api.messages.create(**ask)
    with api.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == "end_turn"
    thinking = api.messages.create(**ask, thinking={"type": "enabled", "budget_tokens": 50})
    assert [block.type for block in thinking.content] == ["thinking", "text"]
    assert (
        api.messages.count_tokens(model="duomo", messages=ask["messages"]).input_tokens
        == whole.usage.input_tokens
    )
    tool = {"name": "look", "input_schema": TOOL["parameters"]}
    called = api.messages.create(**ask, tools=[tool], tool_choice={"type": "any"})
    assert called.content[-1].input and called.stop_reason == "tool_use"


def langchain():
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="duomo", max_retries=0)
    whole = model.invoke([("user", SEE)])
    assert whole.content and whole.usage_metadata["total_tokens"]
    assert "".join(chunk.content for chunk in model.stream("hi")) == whole.content
    tool = {"type": "function", "function": TOOL}
    assert model.bind_tools([tool], tool_choice="look").invoke("hi").tool_calls[0]["name"] == "look"


def instructor():
    import instructor
    import openai
    from pydantic import BaseModel

    class Look(BaseModel):
        text: str

    api = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    ask = {"model": "duomo", "messages": [{"role": "user", "content": "hi"}], "max_retries": 0}
    assert api.chat.completions.create(response_model=Look, **ask).text == "脚本"


globals()[client]()
print(f"{client} passed")
