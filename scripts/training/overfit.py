"""The verdict of `train.py --mode overfit`: whether the model writes the sentence that it was to learn by heart."""

import numpy as np

from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.stack import prepare
from parallax.model.transformer import Params
from scripts.training.job import Job


def report_overfit(job: Job, params: Params) -> int:
    """Prints the verdict; returns 0 if the sentence was learned, 1 if not."""
    model, ids = job.flags.model, job.tokenizer.encode(job.corpus.documents[0])
    request = Request(
        prompts=[ids[:1]], settings=SamplingSettings.create(1, temperature=0.0), seeds=[0], max_tokens=len(ids) - 1
    )
    written = np.concatenate([ids[:1], *Generator(model).generate(prepare(model, params), request)])
    print(f"sentence: {job.corpus.documents[0]}\nwritten:  {job.tokenizer.decode(written)}")
    if np.array_equal(written, ids):
        print("✅ OVERFIT TEST PASSED - Model is mathematically correct!", flush=True)
        return 0
    right = int(np.sum(written == ids))
    print(
        f"❌ OVERFIT TEST FAILED - {right} of {len(ids)} characters are right after {job.flags.train.steps} steps",
        flush=True,
    )
    return 1
