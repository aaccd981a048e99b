"""The paper that the model card of a run cites."""

import textwrap

PAPER = {
    "title": "KL Penalty Control via Perturbation for Direct Preference Optimization",
    "id": "2502.13177",
    "citation": textwrap.dedent("""\
        @article{lee2025edpo,
            title         = {{KL Penalty Control via Perturbation for Direct Preference Optimization}},
            author        = {Sangkyu Lee and Janghoon Han and Hosung Song and Stanley Jungkyu Choi and Honglak Lee and Youngjae Yu},
            year          = 2025,
            eprint        = {arXiv:2502.13177},
        }"""),  # noqa: E501
}
