CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE facts (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    norm_key TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL,
    lang TEXT NOT NULL,
    aliases TEXT NOT NULL DEFAULT '[]',
    prompts TEXT NOT NULL DEFAULT '[]',
    paraphrases TEXT NOT NULL DEFAULT '[]',
    locality TEXT NOT NULL DEFAULT '[]',
    source TEXT,
    state TEXT NOT NULL CHECK (state IN ('pending', 'committed', 'rejected', 'removed')),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);
CREATE INDEX facts_by_state ON facts (state);
CREATE TABLE aliases (
    norm_alias TEXT PRIMARY KEY,
    fact_id INTEGER NOT NULL REFERENCES facts (id)
);
CREATE INDEX aliases_by_fact ON aliases (fact_id);
CREATE TABLE edits (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('add', 'update', 'remove', 'repair', 'rollback')),
    state TEXT NOT NULL
        CHECK (state IN ('planned', 'trained', 'committed', 'rejected', 'failed', 'canceled')),
    parent INTEGER NOT NULL REFERENCES revisions (id),
    revision INTEGER UNIQUE REFERENCES revisions (id),
    delta TEXT,
    reasons TEXT NOT NULL DEFAULT '[]',
    report TEXT NOT NULL DEFAULT '{}',
    config TEXT NOT NULL DEFAULT '{}',
    started_at TEXT NOT NULL,
    finished_at TEXT,
    CHECK ((state = 'committed') = (revision IS NOT NULL))
);
CREATE INDEX edits_by_state ON edits (state);
CREATE TABLE edit_facts (
    edit_id INTEGER NOT NULL REFERENCES edits (id),
    fact_id INTEGER NOT NULL REFERENCES facts (id),
    before TEXT,
    after TEXT,
    PRIMARY KEY (edit_id, fact_id)
);
CREATE INDEX edit_facts_by_fact ON edit_facts (fact_id);
CREATE TABLE revisions (
    id INTEGER PRIMARY KEY,
    parent INTEGER REFERENCES revisions (id) CHECK (parent < id),
    edit_id INTEGER UNIQUE REFERENCES edits (id),
    kind TEXT NOT NULL,
    restores INTEGER REFERENCES revisions (id) CHECK (restores < id),
    delta TEXT,
    weights_digest TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE fact_versions (
    id INTEGER PRIMARY KEY,
    fact_id INTEGER NOT NULL REFERENCES facts (id),
    revision INTEGER NOT NULL REFERENCES revisions (id),
    state TEXT NOT NULL CHECK (state IN ('committed', 'removed')),
    fact TEXT NOT NULL,
    UNIQUE (fact_id, revision)
);
CREATE INDEX fact_versions_by_revision ON fact_versions (revision);
CREATE TABLE probe_results (
    id INTEGER PRIMARY KEY,
    fact_id INTEGER REFERENCES facts (id),
    edit_id INTEGER REFERENCES edits (id),
    revision INTEGER REFERENCES revisions (id),
    kind TEXT NOT NULL
        CHECK (kind IN ('recall', 'paraphrase', 'locality', 'retention', 'portability')),
    protocol TEXT NOT NULL CHECK (protocol IN ('teacher-forced', 'generated')),
    prompt TEXT NOT NULL,
    expected TEXT,
    answer TEXT,
    passed INTEGER NOT NULL,
    margin REAL,
    created_at TEXT NOT NULL
);
CREATE INDEX probe_results_by_fact ON probe_results (fact_id, revision);
CREATE INDEX probe_results_by_edit ON probe_results (edit_id);
CREATE TABLE fact_health (
    fact_id INTEGER PRIMARY KEY REFERENCES facts (id),
    last_checked_revision INTEGER NOT NULL REFERENCES revisions (id),
    last_checked_at TEXT NOT NULL,
    passed INTEGER NOT NULL,
    margin REAL
);
CREATE TABLE prior_answers (
    fact_id INTEGER NOT NULL REFERENCES facts (id),
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (fact_id, prompt)
);
CREATE TABLE protected (
    id INTEGER PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('control', 'locality')),
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    source TEXT NOT NULL
);
CREATE TABLE checkpoints (
    revision INTEGER PRIMARY KEY REFERENCES revisions (id),
    path TEXT NOT NULL,
    digest TEXT NOT NULL
);
