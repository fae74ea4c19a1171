"""On a job's PYTHONPATH: its processes on a node that has MILLIJOULE_TEST_NODE=bad meet the fault MILLIJOULE_TEST_FAULT.

Python imports this by itself at start. What fails is the real call, one line earlier.
"""

import os

if os.environ.get("MILLIJOULE_TEST_NODE") == "bad" and (fault := os.environ.get("MILLIJOULE_TEST_FAULT")):
    import errno
    import tempfile

    from millijoule.workers.errors import NotFoundError, StoreError
    from millijoule.workers.storage import local as storage

    if fault == "sees no output":
        get = storage.LocalStore.get

        def blind(self, key):
            if key == "_job/job.json":
                raise NotFoundError(f"{key} does not exist")
            return get(self, key)

        storage.LocalStore.get = blind
    elif fault == "cannot write the output":

        def refused(self, key, path, on_part=None):
            raise StoreError(f"cannot write {key}: Permission denied")

        storage.LocalStore.put_file = refused
    elif fault == "no scratch space":

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch")

        tempfile.TemporaryDirectory = full
