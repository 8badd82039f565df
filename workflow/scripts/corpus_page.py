"""Write the page of the corpus: what was mapped, dropped, duplicated and kept."""

from pathlib import Path

from cellmill.job import job
from cellmill.provenance import content_hash, git_commit
from cellmill.report.corpus import write_corpus_page

with job(snakemake.log[0]):
    given, params = snakemake.input, snakemake.params

    def named(names: list[str], paths: list[str]) -> dict[str, Path]:  # noqa: D103
        return dict(zip(names, map(Path, paths), strict=True))

    write_corpus_page(
        summaries=[Path(path) for path in given.plans],
        qcs=named(params.selections, given.qc),
        qc_cells=named(params.selections, given.qc_cells),
        shards=named(params.selections, given.shards),
        vocabularies=named(params.organisms, given.vocabularies),
        mapping=Path(given.mapping[0]) if given.mapping else None,
        duplicates=named(params.corpora, given.duplicates),
        leaks=named(params.corpora, given.leaks),
        orthologs=Path(given.orthologs[0]) if given.orthologs else None,
        config=params.config,
        provenance={
            "commit": git_commit(),
            "config_hash": content_hash(params.config),
            "command": params.command,
        },
        out=Path(snakemake.output[0]),
    )
