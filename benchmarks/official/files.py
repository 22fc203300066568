"""The table of official files: what they are, where they come from, how they are recognised.

A checksum stands here only if somebody published it; the comment above an entry says who. Where
none could be found, ``checksum`` is None: then nothing can be verified the first time, so the
SHA-256 of what came is shown and written beside the file, and every later change is refused. For
data sets of the Hugging Face hub the ``revision`` plays the same part. Sizes are exact where a
checksum's source states them, else None.

None of these files is part of the package: most show photographs of other people.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.official.remote import Official, RemoteFile, Snapshot

__all__ = ["OFFICIAL"]


def _drive(file_id: str) -> str:
    """Address of a file on Google Drive that skips the page about the virus scan."""
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


def _mmbench(name: str, md5: str, size: int | None = None) -> RemoteFile:
    url = f"https://opencompass.openxlab.space/utils/benchmarks/MMBench/{name}"
    return RemoteFile(f"mmbench/{name}", url, f"md5:{md5}", size)


_COCO_TERMS = "annotations CC BY 4.0 (COCO Consortium); photographs under Flickr's terms of use"
_MMBENCH_PAGE = "https://github.com/open-compass/MMBench"

OFFICIAL: Mapping[str, Official] = {
    # SHA-256 and size of both archives: tensorflow/datasets, in two files that agree,
    # tensorflow_datasets/url_checksums/coco.txt and coco2014.txt.
    "coco-val2014": Official(
        purpose="pictures of chair, pope (COCO and A-OKVQA questions) and object-halbench",
        parts=(
            RemoteFile(
                "coco/val2014.zip",
                "http://images.cocodataset.org/zips/val2014.zip",
                "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                6645013297,
                unpack="coco/val2014",
            ),
        ),
        target="coco/val2014",
        licence=_COCO_TERMS,
        source="https://cocodataset.org/#download",
    ),
    "coco-annotations": Official(
        purpose="objects and reference captions of COCO 2014, for chair with other pictures than "
        "val2014 and for building pope questions",
        parts=(
            RemoteFile(
                "coco/annotations_trainval2014.zip",
                "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
                "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
                252872794,
                unpack="coco/annotations",
            ),
        ),
        target="coco/annotations",
        licence=_COCO_TERMS,
        source="https://cocodataset.org/#download",
        about="The objects of val2014 are part of mmlm already; chair on val2014 needs no file.",
    ),
    # No published checksum found.
    "gqa-images": Official(
        purpose="pictures of pope's GQA questions",
        parts=(
            RemoteFile(
                "gqa/images.zip",
                "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
                unpack="gqa/images",
            ),
        ),
        target="gqa/images",
        licence="CC BY 4.0 (GQA); photographs of Visual Genome and COCO under Flickr's terms",
        source="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        about="20.3 GB, 148,854 pictures.",
    ),
    # The authors' page links Google Drive; no published checksum found.
    "amber-images": Official(
        purpose="pictures of amber (AMBER_1.jpg ... AMBER_1004.jpg)",
        parts=(
            RemoteFile(
                "amber/images.zip",
                _drive("1MaCHgtupcZUjf007anNl4_MV0o4DjXvl"),
                unpack="amber/images",
            ),
        ),
        target="amber/images",
        licence="Apache-2.0 (AMBER); rights in the photographs stay with their owners",
        source="https://github.com/junyangwang0410/AMBER",
        about="Google Drive refuses files that were fetched too often that day; its page then says "
        "so, and the file can be downloaded in a browser.",
    ),
    # The authors' data set on the hub; neither checksum nor revision published.
    "mmhal-images": Official(
        purpose="pictures of mmhal",
        parts=(
            RemoteFile(
                "mmhal/test_data.zip",
                "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench/resolve/main/test_data.zip",
                unpack="mmhal/test_data",
            ),
        ),
        target="mmhal/test_data/images",
        licence="Apache-2.0 (MMHal-Bench); photographs of OpenImages, CC BY 2.0",
        source="https://huggingface.co/datasets/Shengcao1006/MMHal-Bench",
    ),
    # The authors' page links Google Drive; no published checksum found.
    "hallusionbench-images": Official(
        purpose="figures of hallusionbench (VD/..., VS/...)",
        parts=(
            RemoteFile(
                "hallusionbench/hallusion_bench.zip",
                _drive("1eeO1i0G9BSZTE1yd5XeFwmrbe1hwyf_0"),
                unpack="hallusionbench/images",
            ),
        ),
        target="hallusionbench/images",
        licence="BSD-3-Clause (HallusionBench)",
        source="https://github.com/tianyi-lab/HallusionBench",
    ),
    # The MME page links this data set; no published checksum found.
    "mme": Official(
        purpose="pictures and questions of mme",
        parts=(
            RemoteFile(
                "mme/MME_Benchmark_release_version.zip",
                "https://huggingface.co/datasets/darkyarding/MME/resolve/main/"
                "MME_Benchmark_release_version.zip",
                unpack="mme/MME_Benchmark",
            ),
        ),
        target="mme/MME_Benchmark",
        licence="research use only, as the authors ask; no redistribution",
        source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    ),
    # MD5 of all MMBench files: open-compass/VLMEvalKit, vlmeval/dataset/image_mcq.py (DATASET_MD5).
    "mmbench-dev-en": Official(
        purpose="questions and pictures of mmbench, version 1.0, dev, English",
        parts=(_mmbench("MMBench_DEV_EN.tsv", "b6caf1133a01c6bb705cf753bb527ed8"),),
        target="mmbench/MMBench_DEV_EN.tsv",
        licence="Apache-2.0 (MMBench)",
        source=_MMBENCH_PAGE,
    ),
    "mmbench-dev-cn": Official(
        purpose="questions and pictures of mmbench, version 1.0, dev, Chinese",
        parts=(_mmbench("MMBench_DEV_CN.tsv", "08b8fc3324a5ed74155350f57be69fbd"),),
        target="mmbench/MMBench_DEV_CN.tsv",
        licence="Apache-2.0 (MMBench)",
        source=_MMBENCH_PAGE,
    ),
    "mmbench-dev-en-v11": Official(
        purpose="questions and pictures of mmbench, version 1.1, dev, English",
        parts=(_mmbench("MMBench_DEV_EN_V11.tsv", "30c05be8f2f347a50be25aa067248184"),),
        target="mmbench/MMBench_DEV_EN_V11.tsv",
        licence="Apache-2.0 (MMBench)",
        source=_MMBENCH_PAGE,
    ),
    "mmbench-dev-cn-v11": Official(
        purpose="questions and pictures of mmbench, version 1.1, dev, Chinese",
        parts=(_mmbench("MMBench_DEV_CN_V11.tsv", "593f9b5f6bea453d870a798b34ae4f37"),),
        target="mmbench/MMBench_DEV_CN_V11.tsv",
        licence="Apache-2.0 (MMBench)",
        source=_MMBENCH_PAGE,
    ),
    # No published checksum found.
    "object-halbench": Official(
        purpose="the 300 questions and pictures of object-halbench",
        parts=(
            RemoteFile(
                "object-halbench/obj_halbench_300_with_image.jsonl",
                "https://raw.githubusercontent.com/RLHF-V/RLAIF-V/main/eval/data/"
                "obj_halbench_300_with_image.jsonl",
            ),
        ),
        target="object-halbench/obj_halbench_300_with_image.jsonl",
        licence="none stated for the questions; photographs of COCO under Flickr's terms of use",
        source="https://github.com/RLHF-V/RLAIF-V",
    ),
    # Revision: pinned by several public evaluation programs; not checked against the hub.
    "mmmu": Official(
        purpose="questions and pictures of mmmu, validation",
        parts=(
            Snapshot(
                "mmmu",
                "MMMU/MMMU",
                "98e6ac0cb9b7b2cd2c991b85a50762edc4aedc68",
                ("*/validation-*.parquet",),
            ),
        ),
        target="mmmu",
        licence="Apache-2.0 (MMMU)",
        source="https://mmmu-benchmark.github.io",
    ),
    # Revision: pinned by a public evaluation program; not checked against the hub.
    "blink": Official(
        purpose="questions and pictures of blink, validation",
        parts=(
            Snapshot(
                "blink",
                "BLINK-Benchmark/BLINK",
                "a3666eb249237ba3d5eca8db21176cc47967e040",
                ("*/val-*.parquet",),
            ),
        ),
        target="blink",
        licence="Apache-2.0 (BLINK)",
        source="https://zeyofu.github.io/blink",
    ),
    # No published revision found.
    "mantis": Official(
        purpose="questions and pictures of mantis",
        parts=(Snapshot("mantis", "TIGER-Lab/Mantis-Eval", None, ("*.parquet",)),),
        target="mantis",
        licence="Apache-2.0 (Mantis-Eval)",
        source="https://huggingface.co/datasets/TIGER-Lab/Mantis-Eval",
    ),
    # MD5 and size of the pictures: git-annex keys of datasets-mila/datasets--nlvr2. The questions
    # are pinned by the commit in their address, which the same repository names.
    "nlvr2": Official(
        purpose="questions and pictures of nlvr2, public test set",
        parts=(
            RemoteFile(
                "nlvr2/test1.json",
                "https://raw.githubusercontent.com/lil-lab/nlvr/"
                "3afe9e57355ab49fb92a0dc231436e583d67d125/nlvr2/data/test1.json",
            ),
            RemoteFile(
                "nlvr2/test1_img.zip",
                "https://lil.nlp.cornell.edu/resources/NLVR2/test1_img.zip",
                "md5:e42a8b8fb2fef294e2a54535ee8a1ac2",
                846345997,
                unpack="nlvr2/test1",
            ),
        ),
        target="nlvr2",
        licence="CC BY 4.0 (questions); pictures for research only, after the authors' form",
        source="https://lil.nlp.cornell.edu/nlvr/",
        about="The authors ask every user of the pictures to agree to their terms first.",
    ),
    # No published revision found.
    "mvbench": Official(
        purpose="questions and clips of mvbench",
        parts=(
            Snapshot("mvbench", "OpenGVLab/MVBench", None, ("json/*", "video/*"), archives=True),
        ),
        target="mvbench",
        licence="MIT (questions); clips under the terms of their eleven video data sets",
        source="https://huggingface.co/datasets/OpenGVLab/MVBench",
        about="About 16 GB. The NTU RGB+D clips (320 questions) need their owners' permission and "
        "are not in it.",
    ),
}
"""Everything ``mmlm data fetch`` knows, by name."""
