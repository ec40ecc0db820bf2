"""Chat templates as public models have them, written here from their formats, and conversations for them."""

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
SYSTEM = [{"role": "system", "content": "Be brief. "}, *HELLO]
TURNS = [
    *HELLO,
    {"role": "assistant", "content": "I am a model.\n"},
    {"role": "user", "content": " And 🙂?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "to be, or not to be"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a place, in °C",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALLS = [
    *HELLO,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}],
    },
    {"role": "tool", "content": "21 °C"},
]

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA_2 = """\
{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{% for turn in turns %}
{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set content = first + turn.content if loop.first else turn.content %}
{% if turn.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

MISTRAL = """\
{{ bos_token }}{% for m in messages if m.role != 'system' %}
{%- if m.role == 'user' -%}
[INST] {{ messages[0].content + '\\n\\n' if loop.last and messages[0].role == 'system' }}{{ m.content }} [/INST]
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}
{%- else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif -%}
{% endfor %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] in ('user', 'system', 'assistant') %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

LLAMA_3 = """\
{% set ns = namespace(text='') %}
{%- macro head(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro -%}
{{- '<|begin_of_text|>' -}}
{%- if tools %}{{ head('system') }}Environment: ipython
Today: {{ date_string or '26 Jul 2024' }}
{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}<|eot_id|>{% endif -%}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- set call = message.tool_calls[0].function %}
        {{- head('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- head('ipython') }}{{ message.content | tojson }}<|eot_id|>
    {%- else %}
        {{- head(message.role) + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{% endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI_3 = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] -%}
{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN_3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and ns.last < 0 %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages if message['role'] == 'system' %}
{%- set ns.system = ns.system + message['content'] %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

COMMAND_R = """\
{{ bos_token }}{% for message in messages %}
{%- set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}.get(message['role']) -%}
{{ '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES = {
    # template, the kind of tokenizer, its special tokens, and those added tokens that are not special
    "chatml": (CHATML, "byte_level", IM, ()),
    "generation": (GENERATION, "byte_level", IM, ()),
    "llama 2": (LLAMA_2, "sentencepiece", (), ()),
    "mistral": (MISTRAL, "sentencepiece", (), ()),
    "zephyr": (ZEPHYR, "sentencepiece", (), ()),
    "llama 3": (LLAMA_3, "byte_level", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ()),
    "gemma": (GEMMA, "byte_level", ("<start_of_turn>", "<end_of_turn>"), ()),
    "phi 3": (PHI_3, "sentencepiece", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ()),
    "qwen 3": (QWEN_3, "byte_level", IM, ("<tool_call>", "</tool_call>", "<think>", "</think>")),
    "deepseek": (DEEPSEEK, "byte_level", ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), ("<think>",)),
    "command r": (
        COMMAND_R,
        "byte_level",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        (),
    ),
}


def definition_of(name):
    """(tokenizer.json, spelling of the token that begins a text, that ends one) for a template."""
    import json

    import tokenizers

    from tests.parallax.interop.tokenizers import byte_level, sentencepiece

    _, kind, special, added = TEMPLATES[name]
    definition, begin, end, _ = byte_level() if kind == "byte_level" else sentencepiece()
    model = tokenizers.Tokenizer.from_str(json.dumps(definition))
    model.add_special_tokens(list(special))
    model.add_tokens(list(added))
    return json.loads(model.to_str()), model.id_to_token(begin), model.id_to_token(end)
