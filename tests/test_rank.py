"""What a rank settles before torch starts."""

import pytest

from harness.rank import use_one_gpu


@pytest.mark.parametrize(
    ("started_with", "sees"),
    [
        ({}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "0,1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "0,1"),
    ],
)
def test_a_process_that_no_launcher_started_sees_one_gpu(started_with, sees):
    environment = dict(started_with)
    use_one_gpu(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == sees
