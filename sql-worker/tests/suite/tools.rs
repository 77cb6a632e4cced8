//! What a database holds, what it would do, and reading on: the tools that look.

use serde_json::{Value, json};

use crate::cluster::prepare;
use crate::mcp::Client;

#[tokio::test]
async fn a_schema_is_described_in_steps() {
    let mut client = Client::start().await;
    let cluster = client.broker.cluster.clone();
    prepare(
        &cluster.pool(),
        &[
            "create schema shop",
            "create table shop.customers (id int8 generated always as identity primary key, \
             email text not null unique, name text default 'nobody', \
             label text generated always as (upper(name)) stored)",
            "comment on table shop.customers is 'people'",
            "comment on column shop.customers.email is 'where to write'",
            "create table shop.\"Orders\" (id int4, customer int8 references shop.customers (id), \
             placed date, total numeric(10, 2) check (total > 0), primary key (id, placed)) \
             partition by range (placed)",
            "create table shop.orders_2026 partition of shop.\"Orders\" \
             for values from ('2026-01-01') to ('2027-01-01')",
            "create index by_total on shop.\"Orders\" (total desc)",
            "create view shop.dear as select * from shop.\"Orders\" where total > 100",
            "insert into shop.customers (email) select i::text from generate_series(1, 40) i",
            "analyze shop.customers",
        ],
    )
    .await;
    let describe = |extra: Value| {
        let mut arguments = json!({"database": "main_db"});
        arguments.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        arguments
    };

    let all = client.call("describe_schema", describe(json!({}))).await;
    let schemas = all["schemas"].as_array().unwrap();
    let shop = schemas.iter().find(|schema| schema["name"] == "shop").unwrap();
    assert_eq!(
        *shop,
        json!({"name": "shop", "table_count": 3, "tables": ["Orders", "customers", "dear"]})
    );
    assert!(!schemas.iter().any(|schema| schema["name"] == "pg_catalog"), "{all}");

    let found = client.call("describe_schema", describe(json!({"pattern": "shop.*"}))).await;
    assert_eq!(
        found["tables"],
        json!([
            {"schema": "shop", "name": "Orders", "kind": "partitioned table"},
            {"schema": "shop", "name": "customers", "kind": "table", "row_estimate": 40,
             "comment": "people"},
            {"schema": "shop", "name": "dear", "kind": "view"},
            {"schema": "shop", "name": "orders_2026", "kind": "partition"},
        ])
    );
    let none = client.call("describe_schema", describe(json!({"pattern": "pg_class"}))).await;
    assert_eq!(none["tables"], json!([]));
    let system = describe(json!({"pattern": "pg_catalog.pg_class"}));
    let found = client.call("describe_schema", system).await;
    assert_eq!(found["tables"][0]["name"], "pg_class");

    let table = describe(json!({"table": "shop.customers"}));
    let table = client.call("describe_schema", table).await;
    assert_eq!(
        table["table"],
        json!({
            "schema": "shop", "name": "customers", "kind": "table", "row_estimate": 40,
            "comment": "people",
            "columns": [
                {"name": "id", "type": "bigint", "nullable": false, "identity": "always"},
                {"name": "email", "type": "text", "nullable": false, "comment": "where to write"},
                {"name": "name", "type": "text", "nullable": true, "default": "'nobody'::text"},
                {"name": "label", "type": "text", "nullable": true, "generated": "upper(name)"},
            ],
            "primary_key": ["id"],
            "unique": [["email"]],
            "referenced_by": [{"table": "shop.Orders", "columns": ["customer"],
                "referenced_columns": ["id"]}],
            "indexes": ["CREATE UNIQUE INDEX customers_email_key ON shop.customers USING btree (email)"],
        })
    );
    // Quotes are not needed, but taken; the case of a name that is not there is folded.
    for name in ["shop.Orders", "shop.\"Orders\""] {
        let table = client.call("describe_schema", describe(json!({"table": name}))).await;
        let table = &table["table"];
        assert_eq!(table["primary_key"], json!(["id", "placed"]), "{table}");
        assert_eq!(table["checks"], json!(["CHECK (total > 0::numeric)"]));
        assert_eq!(
            table["foreign_keys"],
            json!([{"columns": ["customer"], "references": "shop.customers",
                "referenced_columns": ["id"]}])
        );
        assert_eq!(table["partition_key"], "RANGE (placed)");
        assert_eq!(table["partitions"][0]["name"], "shop.orders_2026");
        assert!(table["partitions"][0]["bound"].as_str().unwrap().contains("2026-01-01"));
    }
    let part = describe(json!({"table": "SHOP.ORDERS_2026"}));
    let part = client.call("describe_schema", part).await;
    assert_eq!(part["table"]["partition_of"], "shop.Orders");

    for wrong in [
        json!({"table": "shop.canary"}),
        json!({"table": "canary.a.b"}),
        json!({"pattern": ""}),
        json!({"pattern": "a", "table": "b"}),
        json!({"connection_id": "conn_canary"}),
    ] {
        let refused = client.call("describe_schema", describe(wrong)).await;
        assert_eq!(refused["error"]["code"], "INVALID_REQUEST", "{refused}");
        assert!(!refused.to_string().contains("canary"), "{refused}");
    }
}

/// Operators whose operands fit better than those of PostgreSQL's own would be chosen.
#[tokio::test]
async fn nobody_elses_operators_are_run() {
    let mut client = Client::start().await;
    let mut traps = vec![
        "create table trapped (a int4 primary key, b int4 references trapped)".to_owned(),
        "analyze trapped".to_owned(),
    ];
    let types =
        ["name", "text", "\"char\"", "oid", "int2", "int4", "int8", "float4", "float8", "bool"];
    for (left, right) in types.iter().flat_map(|l| types.iter().map(move |r| (l, r))) {
        traps.push(format!(
            "create function public.trap({left}, {right}) returns bool language plpgsql as \
             $$ begin raise exception 'trapped'; end $$"
        ));
        for operator in ["=", "<>", ">", ">=", "<", "<=", "||", "~~", "!~~", "~~*", "!~~*"] {
            // What PostgreSQL itself has for these types comes first on the path.
            traps.push(format!(
                "create operator public.{operator} \
                 (leftarg = {left}, rightarg = {right}, function = public.trap)"
            ));
        }
    }
    let block = format!("do $do$ begin {}; end $do$", traps.join("; "));
    prepare(&client.broker.cluster.pool(), &[&block]).await;
    for extra in [("pattern", "*"), ("pattern", "public.*"), ("table", "trapped")] {
        let arguments = json!({"database": "main_db", extra.0: extra.1});
        let described = client.call("describe_schema", arguments).await;
        assert_eq!(described["success"], true, "{described}");
    }
    let described = client.call("describe_schema", json!({"database": "main_db"})).await;
    assert_eq!(described["success"], true, "{described}");
    let explained = json!({"database": "main_db", "query": "table trapped"});
    let explained = client.call("explain_query", explained).await;
    assert_eq!(explained["success"], true, "{explained}");
}

#[tokio::test]
async fn a_long_list_says_that_it_is_cut() {
    let mut client = Client::start().await;
    let cluster = client.broker.cluster.clone();
    let many = "do $$ begin for i in 1..120 loop \
                execute format('create table crowd.t%s (a int)', i); end loop; end $$";
    let columns: Vec<String> = (0..310).map(|number| format!("c{number} int")).collect();
    let wide = format!("create table crowd_wide.t ({})", columns.join(", "));
    prepare(&cluster.pool(), &["create schema crowd", "create schema crowd_wide", many, &wide])
        .await;
    let all = client.call("describe_schema", json!({"database": "main_db"})).await;
    let names = |schema: &Value| schema["tables"].as_array().unwrap().len();
    let schemas = all["schemas"].as_array().unwrap();
    assert_eq!(schemas.iter().map(names).sum::<usize>(), 100, "{all}");
    let crowd = schemas.iter().find(|schema| schema["name"] == "crowd").unwrap();
    assert_eq!((&crowd["table_count"], &all["truncated"]), (&json!(120), &json!(true)));
    let found = json!({"database": "main_db", "pattern": "crowd.t*"});
    let found = client.call("describe_schema", found).await;
    assert_eq!(found["tables"].as_array().unwrap().len(), 100);
    assert_eq!(found["truncated"], true);
    let table = json!({"database": "main_db", "table": "crowd_wide.t"});
    let table = client.call("describe_schema", table).await;
    assert_eq!(table["table"]["columns"].as_array().unwrap().len(), 300);
    assert_eq!(table["truncated"], true);
}

#[tokio::test]
async fn plans_need_no_values_and_run_nothing() {
    let mut client = Client::start().await;
    let cluster = client.broker.cluster.clone();
    prepare(
        &cluster.pool(),
        &[
            "create table planned (id int4 primary key, note text)",
            "insert into planned select i, 'n' from generate_series(1, 10000) i",
            "analyze planned",
        ],
    )
    .await;
    let explain = |query: &str| json!({"database": "main_db", "query": query});
    for query in ["select * from planned where id = $1", "select * from planned where id = :id;"] {
        let plan = client.call("explain_query", explain(query)).await;
        let lines = plan["plan"].to_string();
        assert!(lines.contains("Index Scan using planned_pkey"), "{plan}");
        assert!(lines.contains("(id = $1)"), "{plan}");
        assert!(plan["total_cost"].as_f64().unwrap() > 0.0, "{plan}");
        assert_eq!(plan["row_estimate"], 1.0, "{plan}");
    }
    let query = "select $1::int4multirange, note from planned where $1::int4multirange @> id";
    let plan = client.call("explain_query", explain(query)).await;
    assert!(plan["plan"].to_string().contains("($1 @> id)"), "{plan}");
    let delete = client.call("explain_query", explain("delete from planned")).await;
    assert!(delete["plan"][0].as_str().unwrap().starts_with("Delete on planned"), "{delete}");
    for (query, code) in [
        ("explain analyze delete from planned", "INVALID_REQUEST"),
        ("vacuum", "INVALID_REQUEST"),
        ("select 1; delete from planned", "SQL_ERROR"),
        ("select 1; commit; delete from planned", "SQL_ERROR"),
        ("selec", "INVALID_REQUEST"),
        ("select * from nowhere", "SQL_ERROR"),
    ] {
        let refused = client.call("explain_query", explain(query)).await;
        assert_eq!(refused["error"]["code"], code, "{query}: {refused}");
    }
    // A function that claims to be immutable is run by the planner, and can change nothing.
    prepare(
        &cluster.pool(),
        &[
            "create function eraser() returns int4 language plpgsql volatile as \
             $$ begin delete from planned; return 1; end $$",
            "create function liar() returns int4 language plpgsql immutable as \
             $$ begin return eraser(); end $$",
        ],
    )
    .await;
    let liar = client.call("explain_query", explain("select liar()")).await;
    assert_eq!(liar["error"]["sqlstate"], "25006", "{liar}");
    let sql = json!({"database": "main_db", "sql": "select count(*)::int4 from planned"});
    assert_eq!(client.call("execute_sql", sql).await["rows"], json!([[10000]]));
    // The session was left as it was found.
    let sql = json!({"database": "main_db",
        "sql": "select count(*)::int4 from pg_prepared_statements where name like 'credbroker%'"});
    assert_eq!(client.call("execute_sql", sql).await["rows"], json!([[0]]));
}

#[tokio::test]
async fn a_destination_is_looked_up_and_never_dialled() {
    let mut client = Client::start().await;
    let parts = json!({"storage_type": "postgresql", "host": "database", "database": "postgres"});
    let text = json!({"connection_string": "postgresql://somebody@database/postgres"});
    for arguments in [parts, text] {
        let open = client.call("connect_storage", arguments).await;
        assert_eq!(open["connection_string"], "postgresql://****:****@database/postgres");
        let id = &open["connection_id"];
        let query = json!({"connection_id": id, "query": "select 1"});
        assert_eq!(client.call("execute_query", query).await["rows"], json!([[1]]));
        let described = client.call("describe_schema", json!({"connection_id": id})).await;
        assert!(described["schemas"].is_array(), "{described}");
        let plan = json!({"connection_id": id, "query": "select 1"});
        assert_eq!(client.call("explain_query", plan).await["success"], true);
        let closed = client.call("disconnect", json!({"connection_id": id})).await;
        assert_eq!(closed["disconnected"], true);
    }
    for (arguments, code) in [
        (json!({"connection_string": "postgresql://canary.example/postgres"}), "ACCESS_DENIED"),
        (json!({"connection_string": "postgresql://u:canary@database/postgres"}), "UNSUPPORTED"),
        (json!({"connection_string": "host=database password=canary"}), "UNSUPPORTED"),
        (json!({"connection_string": "canary"}), "INVALID_REQUEST"),
        (
            json!({"storage_type": "postgresql", "host": "database", "database": "postgres",
                "username": "canary", "password": "canary"}),
            "UNSUPPORTED",
        ),
    ] {
        let refused = client.call("connect_storage", arguments).await;
        assert_eq!(refused["error"]["code"], code, "{refused}");
        assert!(!refused.to_string().contains("canary"), "{refused}");
    }
}

#[tokio::test]
async fn a_cut_query_is_read_on_page_by_page() {
    let mut client = Client::start().await;
    let query = |cursor: Option<&Value>| {
        let mut arguments = json!({"database": "main_db", "max_rows": 4, "params": {"n": 10},
            "sql": "select i as n, i as n from generate_series(1, :n::int4) i order by i desc; -- x"});
        if let Some(cursor) = cursor {
            arguments["cursor"] = cursor.clone();
        }
        arguments
    };
    let mut pages = vec![client.call("execute_sql", query(None)).await];
    while let Some(cursor) = pages.last().unwrap().get("next_cursor").cloned() {
        assert!(cursor.as_str().unwrap().starts_with("cur_"), "{cursor}");
        pages.push(client.call("execute_sql", query(Some(&cursor))).await);
    }
    let rows: Vec<Value> =
        pages.iter().flat_map(|page| page["rows"].as_array().unwrap()).cloned().collect();
    let expected: Vec<Value> = (1..=10).rev().map(|n| json!([n, n])).collect();
    assert_eq!(rows, expected);
    assert_eq!(pages.len(), 3);
    for page in &pages {
        assert_eq!(page["columns"], pages[0]["columns"]);
    }
    assert_eq!(pages[2]["truncated"], false);

    // For something else, it is refused; and what never was gets the answer of what is gone.
    let cursor = pages[0]["next_cursor"].clone();
    let mut other = query(Some(&cursor));
    other["params"]["n"] = json!(11);
    let refused = client.call("execute_sql", other).await;
    assert_eq!(refused["error"]["message"], "cursor was made for another statement");
    let mut other = query(Some(&cursor));
    other["database"] = json!("other_db");
    let refused = client.call("execute_sql", other).await;
    assert_eq!(refused["error"]["message"], "cursor was made for another statement");
    let refused = client.call("execute_sql", query(Some(&json!("cur_canary")))).await;
    assert_eq!(refused["error"]["code"], "INVALID_REQUEST");
    assert!(!refused.to_string().contains("canary"), "{refused}");

    // By bytes, through a connection_id, until the end.
    let open = client.call("connect_named_storage", json!({"connection_name": "main_db"})).await;
    let mut arguments = json!({"connection_id": open["connection_id"],
        "query": "select repeat('x', 60000) from generate_series(1, 40)"});
    let (mut rows, mut pages) = (0, 0);
    loop {
        let page = client.call("execute_query", arguments.clone()).await;
        rows += page["row_count"].as_u64().unwrap();
        pages += 1;
        match page.get("next_cursor") {
            Some(cursor) => arguments["cursor"] = cursor.clone(),
            None => break,
        }
    }
    assert_eq!((rows, pages), (40, 3));
}

#[tokio::test]
async fn what_cannot_be_read_on_has_no_cursor() {
    let mut client = Client::start_with("[defaults]\naccess = \"read-write\"\n").await;
    prepare(&client.broker.cluster.pool(), &["create table not_paged (n int4)"]).await;
    for sql in [
        "show all",
        "explain (costs off) select * from pg_class a join pg_class b using (oid)",
        "insert into not_paged select generate_series(1, 9) returning n",
        "with d as (delete from not_paged returning n) select n from d",
    ] {
        let arguments = json!({"database": "main_db", "max_rows": 1, "sql": sql});
        let page = client.call("execute_sql", arguments).await;
        assert_eq!((&page["truncated"], page.get("next_cursor")), (&json!(true), None), "{page}");
    }
}

/// What a page ran again would else be done again.
#[tokio::test]
async fn reading_on_changes_nothing() {
    let mut client = Client::start_with("[defaults]\naccess = \"read-write\"\n").await;
    prepare(
        &client.broker.cluster.pool(),
        &[
            "create table read_on (n int4)",
            "create function read_on(n int4) returns int4 language sql as \
             $$ insert into read_on values (n) returning n $$",
        ],
    )
    .await;
    let mut arguments = json!({"database": "main_db", "max_rows": 4, "readonly": false,
        "sql": "select read_on(i) from generate_series(1, 9) i"});
    let page = client.call("execute_sql", arguments.clone()).await;
    assert_eq!(page["row_count"], 4, "{page}");
    let count = json!({"database": "main_db", "sql": "select count(*)::int4 from read_on"});
    let before = client.call("execute_sql", count.clone()).await["rows"].clone();
    arguments["cursor"] = page["next_cursor"].clone();
    let refused = client.call("execute_sql", arguments).await;
    assert_eq!(refused["error"]["sqlstate"], "25006", "{refused}");
    assert_eq!(client.call("execute_sql", count).await["rows"], before);
}

#[tokio::test]
async fn a_statement_that_is_too_long_is_not_run() {
    let mut client = Client::start().await;
    let long = format!("select 1 -- {}", "x".repeat(256 << 10));
    for (tool, key) in [("execute_sql", "sql"), ("explain_query", "query")] {
        let mut arguments = json!({"database": "main_db"});
        arguments[key] = long.as_str().into();
        let refused = client.call(tool, arguments).await;
        assert_eq!(refused["error"]["code"], "INVALID_REQUEST", "{tool}");
        let message = refused["error"]["message"].as_str().unwrap();
        assert!(message.contains("longer than 256 KiB"), "{tool}: {message}");
    }
}

#[tokio::test]
async fn connections_tell_their_access() {
    let config = "[connections.other_db]\naccess = \"read-write\"\n";
    let mut client = Client::start_with(config).await;
    let list = client.call("list_connections", json!({})).await;
    let access = list["connections"].as_array().unwrap().iter();
    let access: Vec<_> = access.map(|one| (&one["name"], &one["access"])).collect();
    let expected = [("main_db", "read-only"), ("other_db", "read-write")]
        .map(|(name, access)| (json!(name), json!(access)));
    assert_eq!(access, expected.iter().map(|(name, access)| (name, access)).collect::<Vec<_>>());
}

#[tokio::test]
async fn schemas_are_resources() {
    let mut client = Client::start().await;
    prepare(
        &client.broker.cluster.pool(),
        &["create schema \"re source\"", "create table \"re source\".\"a/b\" (n int4)"],
    )
    .await;
    let listed = client.request("resources/list", json!({})).await;
    let resources = listed["result"]["resources"].as_array().unwrap();
    assert_eq!(resources.len(), 2);
    assert_eq!(resources[0]["uri"], "schema://connection/main_db");
    assert_eq!(resources[0]["mimeType"], "application/json");
    let templates = client.request("resources/templates/list", json!({})).await;
    assert_eq!(
        templates["result"]["resourceTemplates"][0]["uriTemplate"],
        "schema://connection/{connection}/{schema}/{table}"
    );
    for uri in ["schema://connection/main_db", "schema://connection/main_db/re%20source/a%2Fb"] {
        let read = client.request("resources/read", json!({"uri": uri})).await;
        let content = &read["result"]["contents"][0];
        assert_eq!(
            (&content["uri"], &content["mimeType"]),
            (&json!(uri), &json!("application/json"))
        );
        assert_eq!(content["_meta"]["credbroker/untrusted"], true, "{read}");
        let described: Value = serde_json::from_str(content["text"].as_str().unwrap()).unwrap();
        assert_eq!(described["success"], true);
        let table = &described["table"];
        assert!(described["schemas"].is_array() || table["columns"][0]["name"] == "n", "{read}");
    }
    for uri in [
        "schema://connection/none",
        "schema://connection/main_db/public",
        "schema://connection/main_db/public/none",
        "file:///etc/passwd",
    ] {
        let read = client.request("resources/read", json!({"uri": uri})).await;
        assert_eq!(read["error"]["code"], -32002, "{read}");
    }
    let modern = json!({"uri": "schema://connection/none", "_meta": {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {}}});
    let read = client.request("resources/read", modern).await;
    assert_eq!(read["error"]["code"], -32602, "{read}");
    for method in ["tools/list", "resources/list", "resources/templates/list"] {
        let page = client.request(method, json!({"cursor": "canary"})).await;
        assert_eq!(page["error"]["code"], -32602, "{page}");
        assert!(!page.to_string().contains("canary"), "{page}");
    }
}

#[tokio::test]
async fn what_is_not_offered_is_neither_described_nor_planned() {
    let config = "[connections.main_db]\ntables = [\"told.orders\", \"told.users\"]\n\
                  mask = [\"told.users.email\"]\n";
    let mut client = Client::start_with(config).await;
    let tables = [
        "create schema told",
        "create table told.users (id int4, email text)",
        "create table told.orders (id int4)",
        "create table told.hidden (id int4)",
    ];
    prepare(&client.broker.cluster.pool(), &tables).await;
    let ask = |what: Value| {
        let mut arguments = json!({"database": "main_db"});
        arguments.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        arguments
    };
    let overview = client.call("describe_schema", ask(json!({}))).await;
    let schemas = json!([{"name": "told", "table_count": 2, "tables": ["orders", "users"]}]);
    assert_eq!(overview["schemas"], schemas);
    let found = client.call("describe_schema", ask(json!({"pattern": "told.*"}))).await;
    let names: Vec<_> = found["tables"].as_array().unwrap().iter().map(|t| &t["name"]).collect();
    assert_eq!(names, ["orders", "users"]);
    let users = client.call("describe_schema", ask(json!({"table": "told.users"}))).await;
    assert_eq!(users["table"]["columns"][1]["masked"], true, "{users}");
    assert!(users["table"]["columns"][0].get("masked").is_none(), "{users}");
    let hidden = client.call("describe_schema", ask(json!({"table": "told.hidden"}))).await;
    assert_eq!(hidden["error"]["code"], "INVALID_REQUEST");

    let plan = |query: &str| ask(json!({"query": query}));
    let orders = client.call("explain_query", plan("select * from told.orders")).await;
    assert_eq!(orders["success"], true, "{orders}");
    for query in ["select * from told.hidden", "select id from told.users where email = 'ada'"] {
        let refused = client.call("explain_query", plan(query)).await;
        assert_eq!(refused["error"]["code"], "ACCESS_DENIED", "{query}: {refused}");
    }
}

#[tokio::test]
async fn a_statement_has_a_longest_length() {
    let mut client = Client::start().await;
    let long = format!("select 1 -- {}", "x".repeat(256 << 10));
    let refused = client.call("execute_sql", json!({"database": "main_db", "sql": long})).await;
    assert_eq!(refused["error"]["code"], "INVALID_REQUEST", "{refused}");
}
