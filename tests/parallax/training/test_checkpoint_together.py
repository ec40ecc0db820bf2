"""Two real processes that save together: where it fails in one, it fails in both, and the next save goes well."""

import json

from tests.parallelism.test_hosts import HANG_SECONDS, pair

SAVES = """
    import resource
    import jax, jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from parallax.training.checkpoint import Checkpointer

    def main():
        join(cluster)
        across = NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec("data"))
        state = {"params": jax.jit(lambda: jnp.arange(2.0**16), out_shardings=across)()}
        checkpoints, said = Checkpointer(FOLDER, keep=3, is_writer=number == 0), {}

        def fail():
            raise OSError("the bucket does not answer")

        for step in range(1, 8):
            # In process 0, the writer, and in 1: no file of more than 10 bytes can be written, not even of metadata.
            if (step, number) in ((2, 0), (4, 1)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
            if step == 7 and number == 0:
                checkpoints.steps = fail
            try:
                checkpoints.save(step, state, {"progress": {}}, before=fail if step == 6 else lambda: None)
                checkpoints.wait()
            except OSError as error:
                said[step] = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        vars(checkpoints).pop("steps", None)
        checkpoints.measured(5, 0.5)
        restored = checkpoints.restore({"params": jax.ShapeDtypeStruct((2**16,), np.float32, sharding=across)})
        print(json.dumps([said, checkpoints.steps(), restored.step, restored.eval_loss]))
        checkpoints.close()
        return 0

    raise SystemExit(run_process(main))
"""


def test_a_save_that_fails_in_one_process_fails_in_both_and_the_next_goes_well(tmp_path):
    script = SAVES.replace("FOLDER", repr(str(tmp_path / "saved")))
    with pair(script) as processes:
        ended = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    for number, (out, _) in enumerate(ended):
        said, *found = json.loads(out.splitlines()[-1])
        assert found == [[1, 3, 5], 5, 0.5]
        *full, sent, read = (said.pop(step) for step in "2467")
        assert said == {}
        assert "the bucket does not answer" in sent
        assert read == ("process 0 cannot read what is saved" if number else "the bucket does not answer")
        for process, reason in enumerate(full):
            assert reason.startswith(f"checkpoint {2 * process + 2} could not be saved in {tmp_path / 'saved'}: ")
            assert "File too large" in reason
            assert (f"process {process}: " in reason) == (number != process)
