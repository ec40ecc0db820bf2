"""Small tokenizers of the two kinds that Llama, Mistral and Qwen models bring, made here."""

import json

TEXT = "To be, or not to be: that is the question — 'ça va?', αβγ 🙂🙂\r\n\tif x == 3:\n" * 20


def byte_level(begin="<|begin_of_text|>"):
    """As Llama 3 and Qwen have: (tokenizer.json, ids that begin a text or None, end it, and begin a chat's turn)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = [*([begin] if begin else []), "<|end_of_text|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=special,
    )
    model.train_from_iterator([TEXT], trainer)
    begin_id, end_id, turn_id = (model.token_to_id(token or "none") for token in (begin, *special[-2:]))
    if begin:
        model.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, begin_id)])
    return json.loads(model.to_str()), begin_id, end_id, turn_id


def sentencepiece():
    """As Llama 2 and Mistral have, with <s> before a text: (tokenizer.json, 1, 2, None)."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "T"), ("▁T", "o"), ("b", "e"), ("▁", "be")]
    letters = sorted({letter for pair in merges for letter in "".join(pair)} | set("abcdeqrsuvwx,:?"))
    pieces += letters + [left + right for left, right in merges]
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(dict.fromkeys(pieces))},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(model.to_str()), 1, 2, None
