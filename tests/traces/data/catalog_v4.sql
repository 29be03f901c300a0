-- Written by `sqlite3.Connection.iterdump` from the catalog of lynearm at schema version 4, brought there from
-- version 3.
BEGIN TRANSACTION;
CREATE TABLE block_store (
	id INTEGER NOT NULL, 
	identity TEXT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE blocks (
	stream_id INTEGER NOT NULL, 
	"offset" BIGINT NOT NULL, 
	object_id INTEGER NOT NULL, 
	position BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	checksum BLOB NOT NULL, 
	trace_count BIGINT NOT NULL, 
	prompt_token_count BIGINT NOT NULL, 
	completion_token_count BIGINT NOT NULL, 
	producer_key INTEGER NOT NULL, 
	epoch BIGINT NOT NULL, 
	sequence BIGINT NOT NULL, labels BLOB, 
	PRIMARY KEY (stream_id, "offset"), 
	UNIQUE (producer_key, epoch, sequence), 
	FOREIGN KEY(stream_id) REFERENCES streams (id), 
	FOREIGN KEY(object_id) REFERENCES objects (id), 
	FOREIGN KEY(producer_key) REFERENCES producers (id)
)
 WITHOUT ROWID

;
INSERT INTO "blocks" VALUES(1,0,1,0,41,X'260C7B989F5146D7',2,3,5,1,1,1,NULL);
INSERT INTO "blocks" VALUES(1,1,1,41,41,X'8ABF5A86A89119F6',2,3,5,1,1,2,NULL);
CREATE TABLE consumers (
	stream_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	"offset" BIGINT NOT NULL, 
	trace_index BIGINT NOT NULL, 
	updated_unix_nano BIGINT NOT NULL, 
	PRIMARY KEY (stream_id, name), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
)
 WITHOUT ROWID

;
INSERT INTO "consumers" VALUES(1,'trainer',1,0,1795742686581831723);
CREATE TABLE dictionaries (
	stream_id INTEGER NOT NULL, 
	digest BLOB NOT NULL, 
	content BLOB NOT NULL, 
	PRIMARY KEY (stream_id, digest), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
);
INSERT INTO "dictionaries" VALUES(1,X'79F076ABDD19A752',X'6B657074');
CREATE TABLE expired_blocks (
	producer_key INTEGER NOT NULL, 
	epoch BIGINT NOT NULL, 
	sequence BIGINT NOT NULL, 
	stream_id INTEGER NOT NULL, 
	"offset" BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	checksum BLOB NOT NULL, 
	PRIMARY KEY (producer_key, epoch, sequence), 
	FOREIGN KEY(producer_key) REFERENCES producers (id), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
)
 WITHOUT ROWID

;
CREATE TABLE finished_prompts (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	stream_id INTEGER NOT NULL, 
	prompt_id TEXT NOT NULL, 
	"offset" BIGINT NOT NULL, 
	UNIQUE (stream_id, prompt_id), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
);
INSERT INTO "finished_prompts" VALUES(1,1,'p0',0);
INSERT INTO "finished_prompts" VALUES(2,1,'p1',1);
CREATE TABLE finished_samples (
	stream_id INTEGER NOT NULL, 
	prompt_id TEXT NOT NULL, 
	"offset" BIGINT NOT NULL, 
	sample_indices BLOB NOT NULL, 
	PRIMARY KEY (stream_id, prompt_id, "offset"), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
)
 WITHOUT ROWID

;
CREATE TABLE job_prompts (
	job_id INTEGER NOT NULL, 
	first_prompt BIGINT NOT NULL, 
	prompt_count BIGINT NOT NULL, 
	prompt_ids BLOB NOT NULL, 
	contents BLOB NOT NULL, 
	PRIMARY KEY (job_id, first_prompt), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE jobs (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	stream_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	samples_per_prompt BIGINT NOT NULL, 
	prompt_count BIGINT NOT NULL, 
	content_sha256 BLOB NOT NULL, 
	stored_prompt_count BIGINT NOT NULL, 
	stored_sha256 BLOB NOT NULL, 
	created_unix_nano BIGINT NOT NULL, 
	next_unit BIGINT NOT NULL, 
	done_count BIGINT NOT NULL, 
	cancelled BOOLEAN NOT NULL, 
	UNIQUE (stream_id, name), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
);
CREATE TABLE leases (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	job_id INTEGER NOT NULL, 
	first_unit BIGINT NOT NULL, 
	done BLOB NOT NULL, 
	open_count BIGINT NOT NULL, 
	holder TEXT NOT NULL, 
	generation BIGINT NOT NULL, 
	news BIGINT NOT NULL, 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE objects (
	id INTEGER NOT NULL, 
	"key" TEXT NOT NULL, created_unix_nano BIGINT DEFAULT 0 NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE ("key")
);
INSERT INTO "objects" VALUES(1,'da4e69c21cb5dd56e03b545a9f730a9d',1795751482353497654);
CREATE TABLE producers (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	stream_id INTEGER NOT NULL, 
	producer_id TEXT NOT NULL, 
	epoch BIGINT NOT NULL, 
	last_sequence BIGINT NOT NULL, 
	UNIQUE (stream_id, producer_id), 
	FOREIGN KEY(stream_id) REFERENCES streams (id)
);
INSERT INTO "producers" VALUES(1,1,'teacher',1,2);
CREATE TABLE schema_version (
	version INTEGER NOT NULL
);
INSERT INTO "schema_version" VALUES(4);
CREATE TABLE streams (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	name TEXT NOT NULL, 
	spec BLOB NOT NULL, 
	sealed BOOLEAN NOT NULL, 
	created_unix_nano BIGINT NOT NULL, 
	next_offset BIGINT NOT NULL, 
	trace_count BIGINT NOT NULL, 
	prompt_token_count BIGINT NOT NULL, 
	completion_token_count BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	finished_prompt_count BIGINT NOT NULL, 
	dictionary_count BIGINT DEFAULT 0 NOT NULL, 
	dictionary_bytes BIGINT DEFAULT 0 NOT NULL, max_lag_blocks BIGINT DEFAULT 0 NOT NULL, max_lag_traces BIGINT DEFAULT 0 NOT NULL, first_offset BIGINT DEFAULT 0 NOT NULL, retained_bytes BIGINT DEFAULT 0 NOT NULL, max_age_seconds BIGINT DEFAULT 0 NOT NULL, max_bytes BIGINT DEFAULT 0 NOT NULL, read_by TEXT DEFAULT '' NOT NULL, 
	UNIQUE (name)
);
INSERT INTO "streams" VALUES(1,'old',X'0A036F6C6412340A077465616368657212097368613235363A30301A04746573742207666C6F61743332288001308004380141000000000000F03F1A2D0A03746F6B122000000000000000000000000000000000000000000000000000000000000000002080012A01022204080110042A0A4170616368652D322E30',0,1795738963195657312,2,4,6,10,82,2,1,4,0,0,0,82,0,0,'');
INSERT INTO "streams" VALUES(2,'sealed',X'0A067365616C656412340A077465616368657212097368613235363A30301A04746573742207666C6F61743332288001308004380141000000000000F03F1A2D0A03746F6B122000000000000000000000000000000000000000000000000000000000000000002080012A01022204080110042A0A4170616368652D322E30',1,1795738963197187269,0,0,0,0,0,0,0,0,0,0,0,0,0,0,'');
CREATE INDEX finished_prompts_by_position ON finished_prompts (stream_id, position);
CREATE INDEX blocks_by_object ON blocks (object_id);
CREATE INDEX leases_by_job ON leases (job_id, first_unit);
CREATE INDEX expired_blocks_by_stream ON expired_blocks (stream_id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('streams',2);
INSERT INTO "sqlite_sequence" VALUES('producers',1);
INSERT INTO "sqlite_sequence" VALUES('finished_prompts',2);
COMMIT;
