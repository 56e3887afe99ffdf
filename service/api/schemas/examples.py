"""Worked examples for the OpenAPI document, from the demo bundle's domains."""

from __future__ import annotations

from typing import Any

from service.api.schemas import answers, openai_answers

_SITES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
_SCALINGS: answers.Scalings = {
    "experts": ["math", "code"],
    "sites": _SITES,
    "start": 5,
    "mean": [[0.93, 0.07], [0.95, 0.05]],
    "entropy": [0.21, 0.17],
}
_COST: answers.Cost = {
    "forward_passes": 3,
    "scaling_rows": 8,
    "real_rows": 7,
    "lookahead": {"hits": 1, "misses": 0},
    "speculation": {"tokens": 0, "accepted": 0},
    "drafts": {"lookahead": [{"depth": 1, "drafted": 1, "accepted": 1}], "prompt_lookup": []},
}
_USAGE: answers.Usage = {"prompt_tokens": 6, "completion_tokens": 2, "cached_tokens": 0, **_COST}
_HEAD: answers.GenerateHead = {"id": "gen-5f0c6c7e", "model": "demo", "seed": 7}

GENERATE_BODIES: Any = {
    "greedy": {"summary": "Greedy", "value": {"prompt": "12 + 30 =", "max_tokens": 8, "temperature": 0}},
    "scalings": {
        "summary": "With one row of scalings per generated token",
        "value": {"prompt": "12 + 30 =", "max_tokens": 8, "return_scalings": "mean", "seed": 7},
    },
    "experts": {
        "summary": "Steered: the gate chooses among all experts but one, and decides more sharply",
        "value": {
            "prompt": "12 + 30 =",
            "max_tokens": 8,
            "experts": {"exclude": ["code"]},
            "gate": {"temperature": 0.5},
        },
    },
    "regex": {
        "summary": "Held to a regular expression",
        "value": {"prompt": "12 + 30 =", "response_format": {"type": "regex", "pattern": " [0-9]{1,3}"}},
    },
    "stream": {
        "summary": "As server-sent events, ending before a line break",
        "value": {"prompt": "def add(a, b):", "max_tokens": 32, "stop": "\n", "stream": True},
    },
}
GENERATE_ANSWER: answers.GenerateAnswer = {
    **_HEAD,
    "outputs": [
        {
            "index": 0,
            "text": " 42",
            "token_ids": [220, 87],
            "tokens": [{"id": 220, "text": " "}, {"id": 87, "text": "42"}],
            "finish_reason": "length",
            "scalings": _SCALINGS,
        }
    ],
    "usage": _USAGE,
}
GENERATE_EVENTS: tuple[answers.GenerateDelta, answers.GenerateEnd] = (
    {
        "id": "gen-5f0c6c7e",
        "index": 0,
        "text": " 42",
        "token_ids": [87],
        "tokens": [{"id": 87, "text": " 42"}],
        "finish_reason": "length",
    },
    {**_HEAD, "usage": {**_USAGE, "completion_tokens": 1}},
)
COMPARE_BODIES: Any = {
    "experts": {
        "summary": "X-LoRA, one expert alone, and the base model",
        "value": {
            "prompt": "12 + 30 =",
            "max_tokens": 8,
            "temperature": 0,
            "settings": [
                {"label": "X-LoRA"},
                {"label": "math", "experts": {"weights": {"math": 1}}},
                {"label": "base", "experts": {"only": []}},
            ],
        },
    },
    "given": {
        "summary": "An output that is there already, judged by two settings",
        "value": {
            "prompt": "12 + 30 =",
            "settings": [{"token_ids": [220, 87]}, {"experts": {"only": []}, "token_ids": [220, 87]}],
        },
    },
}
COMPARE_ANSWER: answers.CompareAnswer = {
    "id": "cmp-5f0c6c7e",
    "model": "demo",
    "seed": 7,
    "outputs": [
        {
            "index": 0,
            "label": "X-LoRA",
            "text": " 42",
            "finish_reason": "length",
            "token_ids": [220, 87],
            "tokens": [{"id": 220, "text": " ", "logprob": -0.1}, {"id": 87, "text": "42", "logprob": -0.3}],
        },
        {
            "index": 1,
            "label": "base",
            "experts": {"only": []},
            "text": " 52",
            "finish_reason": "length",
            "token_ids": [220, 91],
            "tokens": [{"id": 220, "text": " ", "logprob": -0.2}, {"id": 91, "text": "52", "logprob": -1.2}],
        },
    ],
    "log_likelihood": {"sum": [[-0.4, -6.2], [-2.6, -1.4]], "per_token": [[-0.2, -3.1], [-1.3, -0.7]]},
    "usage": {**_USAGE, "prompt_tokens": 12, "completion_tokens": 4, "scored_tokens": 8},
}
GATE_BODIES: Any = {
    "top_k": {
        "summary": "One expert per site, at half strength",
        "value": {"top_k_lora": 1, "global_scaling_weight": 0.5},
    },
    "uniform": {"summary": "All experts in the scaling pass, 1/E each", "value": {"scaling_pass_value": None}},
}
LOG_BODIES: Any = {
    "on": {"summary": "The newest 4096 positions", "value": {"enabled": True, "max_tokens": 4096}},
    "off": {"summary": "Off; the rows stay", "value": {"enabled": False}},
}
SCALINGS_BODIES: Any = {
    "mean": {"summary": "Mean over the sites", "value": {"prompt": "12 + 30"}},
    "full": {
        "summary": "Every site, as a float16 array",
        "value": {"prompt": "12 + 30", "return_scalings": "full", "scalings_dtype": "float16"},
    },
    "sites": {
        "summary": "Two positions by module type, as a table",
        "value": {
            "prompt": "12 + 30",
            "granularity": "module_type",
            "select": {"start": 1, "stop": 3},
            "format": "csv",
        },
    },
    "perplexity": {
        "summary": "Whether the gate chose well",
        "value": {"prompt": "12 + 30", "perplexity": True, "format": "csv"},
    },
    "divergence": {"summary": "How differently two texts are read", "value": {"prompt": ["12 + 30", "def add("]}},
}
SCALINGS_CSV = "text,module_type,math,code,entropy_nats\r\n0,q_proj,0.93,0.07,0.21\r\n"
SCALINGS_ANSWER: answers.ScalingsAnswer = {
    "id": "scal-0a1b2c3d",
    "model": "demo",
    "tokens": [{"id": 21, "text": "12"}, {"id": 300, "text": " +"}],
    "scalings": {**_SCALINGS, "start": 0},
    "totals": {"math": 0.94, "code": 0.06},
    "top1": {"math": 1.0, "code": 0.0},
    "entropy": 0.19,
    "usage": {"prompt_tokens": 2, "forward_passes": 1, "scaling_rows": 2},
}
TOKENIZE_BODIES: Any = {
    "text": {"summary": "A text", "value": {"text": "12 + 30 ="}},
    "chat": {"summary": "A conversation", "value": {"messages": [{"role": "user", "content": "12 + 30 ="}]}},
}
DETOKENIZE_BODIES: Any = {"ids": {"summary": "Two tokens", "value": {"token_ids": [21, 300]}}}

_AS_USED: openai_answers.AsUsed = {"seed": 7}
_OPENAI_WHOLE: openai_answers.OpenAIAnswer = {
    "id": "cmpl-5f0c6c7e",
    "created": 1795474800,
    "model": "demo",
    "system_fingerprint": "fp_0a1b2c3d4e5f",
    "usage": {
        "prompt_tokens": 6,
        "completion_tokens": 2,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
    "xlora": {**_AS_USED, **_COST},
}
COMPLETION_BODIES: Any = {
    "text": {"summary": "A text", "value": {"prompt": "12 + 30 =", "max_tokens": 8, "temperature": 0}},
    "batch": {
        "summary": "Two prompts, with scalings",
        "value": {"prompt": ["12 + 30 =", "def add("], "max_tokens": 8, "xlora": {"return_scalings": "mean"}},
    },
}
COMPLETION_ANSWER: openai_answers.CompletionAnswer = {
    **_OPENAI_WHOLE,
    "object": "text_completion",
    "choices": [{"index": 0, "text": " 42", "logprobs": None, "finish_reason": "length"}],
}
COMPLETION_EVENTS: tuple[openai_answers.CompletionChunk] = (
    {
        "id": "cmpl-5f0c6c7e",
        "object": "text_completion",
        "created": 1795474800,
        "model": "demo",
        "system_fingerprint": "fp_0a1b2c3d4e5f",
        "choices": [{"index": 0, "text": " 42", "logprobs": None, "finish_reason": "length"}],
        "xlora": _AS_USED,
    },
)
CHAT_BODIES: Any = {
    "json": {
        "summary": "JSON that fits a schema",
        "value": {
            "messages": [{"role": "user", "content": "Compute 48 + 87."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "sum",
                    "schema": {
                        "type": "object",
                        "properties": {"sum": {"type": "integer"}},
                        "required": ["sum"],
                        "additionalProperties": False,
                    },
                },
            },
            "max_tokens": 32,
        },
    },
    "chat": {
        "summary": "One question",
        "value": {"model": "demo", "messages": [{"role": "user", "content": "Compute 48 + 87."}], "max_tokens": 8},
    },
    "tool": {
        "summary": "A function call, with arguments that fit its parameters",
        "value": {
            "messages": [{"role": "user", "content": "Compute 48 + 87."}],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "add",
                        "parameters": {
                            "type": "object",
                            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                            "required": ["a", "b"],
                        },
                    },
                }
            ],
            "tool_choice": "required",
            "max_tokens": 64,
        },
    },
    "stream": {
        "summary": "As server-sent events, with the usage",
        "value": {
            "messages": [{"role": "user", "content": "Compute 48 + 87."}],
            "max_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
}
CHAT_ANSWER: openai_answers.ChatAnswer = {
    **_OPENAI_WHOLE,
    "id": "chatcmpl-5f0c6c7e",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Ones: 8+7", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ],
}
CHAT_EVENTS: tuple[openai_answers.ChatChunk] = (
    {
        "id": "chatcmpl-5f0c6c7e",
        "object": "chat.completion.chunk",
        "created": 1795474800,
        "model": "demo",
        "system_fingerprint": "fp_0a1b2c3d4e5f",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "Ones"},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "xlora": _AS_USED,
    },
)
