"""vLLM's side of `duomo.bench.beside_vllm`: run by the Python of its environment, without anything of duomo.

Arguments: a checkpoint folder and a dtype. Each line of input is a JSON list of prompts (ids) and a number of
tokens; each answer is one line `RESULT {"seconds": ..., "cpu_seconds": ..., "tokens": [...]}`.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> None:
    import vllm  # type: ignore[import-not-found]

    model = vllm.LLM(
        sys.argv[1],
        dtype=sys.argv[2],
        max_model_len=2048,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    print(f"RESULT {json.dumps({'version': vllm.__version__})}", flush=True)
    for line in sys.stdin:
        prompts, num_tokens = json.loads(line)
        params = vllm.SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        begun, cpu_begun = time.perf_counter(), time.process_time()
        outputs = model.generate(asked, params, use_tqdm=False)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(
            f"RESULT {json.dumps({'seconds': seconds, 'cpu_seconds': cpu_seconds, 'tokens': tokens})}",
            flush=True,
        )


if __name__ == "__main__":
    main()
