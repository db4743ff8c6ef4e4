#!/usr/bin/env bash
# A vLLM server for PPO's `engine: vllm` (docs/engines.md). Run it in vLLM's own environment:
#
#     scripts/rollout_server.sh runs/demo/sft 8000 --max-model-len 128 --dtype float32
#
# PARENT: the folder (or Hub id) of the recipe's `parent`. Whatever follows PORT goes to vLLM (--tensor-parallel-size 2, ...).
# It listens on this machine alone; for trainers elsewhere add `--host 0.0.0.0` in a network that you trust: in development
# mode whoever reaches the port can load weights and run methods of the workers.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: $0 PARENT [PORT [flags of vLLM ...]]" >&2
    exit 2
fi
parent=$1
port=${2:-8000}
shift $(($# > 1 ? 2 : 1))
python=${PYTHON:-python3}
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
case " $* " in *" --enable-lora "*) export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 ;; esac # adapters are loaded while it runs
more=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2} # GiB
    PYTHONPATH=$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    # A prompt that is cut in two would rewind its request's generator, which torch has on GPUs alone (vLLM 0.32: the server dies).
    more=(--enforce-eager --no-enable-chunked-prefill --worker-extension-cls vllm_unpacked_head.WorkerExtension)
fi
# generation-config vllm: no sampling rules of the parent's; processed_logprobs: those of the distribution that is sampled.
exec "$python" -m vllm.entrypoints.openai.api_server --model "$parent" --served-model-name policy --host 127.0.0.1 --port "$port" \
    --generation-config vllm --logprobs-mode processed_logprobs "${more[@]}" "$@"
