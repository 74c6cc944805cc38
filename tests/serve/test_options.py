import shlex

import pytest

from duomo.errors import ConfigError
from duomo.serve.flags import DEPRECATED, WITHOUT_MEANING
from duomo.serve.options import Options, parse

SEED = "--model PATH --port 8180 --enable-mm --reasoning-parser ernie-45-vl --max-model-len 32768"


def test_the_seed_command_line_is_read_unchanged():
    options = parse(shlex.split(SEED))
    assert (options.model, options.port, options.max_model_len) == ("PATH", 8180, 32768)
    assert options.reasoning_parser == "ernie-45-vl"
    assert len(options.notes) == 1 and "--enable-mm" in options.notes[0]


def test_the_commands_of_the_models_own_documents_are_read():
    options = parse(
        shlex.split(
            "--model P --tensor-parallel-size 1 --max-num-seqs 32 --max-model-len 131072 "
            '--limit-mm-per-prompt \'{"image": 100, "video": 100}\' --reasoning-parser ernie-45-vl-thinking '
            "--tool-call-parser ernie-45-vl-thinking "
            "--mm-processor-kwargs '{\"image_max_pixels\": 12845056 }' "
            "--gpu-memory-utilization 0.9 --max-num-batched-tokens 16384 --quantization wint4 --enable-mm"
        )
    )
    assert options.limit_mm_per_prompt == {"image": 100, "video": 100}
    assert options.mm_processor_kwargs == {"image_max_pixels": 12845056}
    assert options.max_num_seqs == 32 and options.tool_call_parser == "ernie-45-vl-thinking"
    said = " ".join(options.notes)
    for name in ("tensor-parallel-size", "gpu-memory-utilization", "quantization", "enable-mm"):
        assert f"--{name} " in said


@pytest.mark.parametrize("name", [*WITHOUT_MEANING, *DEPRECATED])
def test_every_flag_without_meaning_is_accepted_bare_and_with_a_value_and_says_so(name):
    for argv in ([f"--{name}"], [f"--{name}", "7"], [f"--{name}=x"]):
        options = parse(["--port", "1", *argv, "--max-num-seqs", "3"])
        assert options.max_num_seqs == 3 and options.notes[0].startswith(f"--{name} ")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--port", "99999"], "between 0 and 65535"),
        (["--port", "x"], "invalid int value"),
        (["--reasoning-parser", "qwen3"], "invalid choice"),
        (["--max-model-len", "1"], "at least 16"),
        (["--limit-mm-per-prompt", '{"image": -1}'], "0 or more"),
        (["--limit-mm-per-prompt", '{"sound": 1}'], "no kind of medium"),
        (["--mm-processor-kwargs", "[1]"], "not a JSON object"),
        (["--allowed-local-media-path", "/no/such/folder"], "not a folder"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--config", "/no/such/file"], "cannot be read"),
    ],
)
def test_a_bad_flag_is_one_clear_line(argv, said):
    with pytest.raises(ConfigError) as wrong:
        parse(argv)
    assert said in wrong.value.message and "\n" not in wrong.value.message


def test_a_file_gives_defaults_that_flags_override(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text('{"port": 9000, "max-num-seqs": 4, "enable_mm": true, "api_key": ["a", "b"]}')
    options = parse(["--config", str(path), "--port", "9001"])
    assert (options.port, options.max_num_seqs, options.api_key) == (9001, 4, ("a", "b"))
    assert len(options.notes) == 1 and options.notes[0].startswith("--enable-mm ")
    path.write_text('{"port": "9000"}')
    with pytest.raises(ConfigError, match="it must be int"):
        parse(["--config", str(path)])
    path.write_text('{"prot": 9000}')
    with pytest.raises(ConfigError, match="no option"):
        parse(["--config", str(path)])


def test_the_defaults_are_safe():
    options = Options()
    assert options.host == "127.0.0.1"
    assert not options.allow_private_media and options.allowed_local_media_path is None
    assert options.cors_origin == () and not options.log_prompts
