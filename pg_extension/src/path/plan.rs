//! The ways from a table to its parent and down from a parent, as the registry has them.

use crate::catalog;
use crate::invalidation::News;
use crate::render::Found;
use crate::row_trigger::{self, Table};
use crate::settings;
use crate::spi::{Plan, Value};
use crate::tuple::{self, Field};
use pgrx::pg_sys;
use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::str::FromStr;

/// Between the parts of a list in an answer.
const SEPARATOR: u8 = 1;

/// From a table's row to its parent's.
pub struct Edge {
    pub parent: u32,
    /// The child's columns, by name.
    pub columns: Vec<Vec<u8>>,
    /// The parent's columns that they lead to.
    pub parent_columns: Vec<Vec<u8>>,
    /// What every id of such a parent begins with.
    prefix: Vec<u8>,
    /// The parent's tenant column or, when it leads on, the columns that lead to its own parent.
    pub results: Vec<Vec<u8>>,
    pub leads_on: bool,
    /// The results' texts depend on settings.
    pub needs_settings: bool,
    /// Locks the parent's row, and says what the version that the lock was asked for had.
    lock: Plan,
    /// Says what the newest committed version has.
    read: Plan,
    /// Where the parent's rows are, each with an index on the key.
    pub leaves: Vec<(pg_sys::Oid, pg_sys::Oid)>,
    /// Where the columns are in the table (or partition) that was asked about last.
    places: RefCell<Option<(Rc<Table>, Places)>>,
}

/// The child's columns that lead to the parent, as indexes into the layout's columns, and how many of a tuple's fields
/// hold them.
#[derive(Clone, Default)]
pub struct Places {
    columns: Vec<usize>,
    width: usize,
}

/// A table that rows of others find their tenants in.
pub struct Parent {
    pub keys: Vec<Key>,
    /// `None`: its rows' tenants are found through its own parent.
    pub tenant_column: Option<Vec<u8>>,
}

/// One of the keys by which a parent is found.
pub struct Key {
    pub columns: Vec<Vec<u8>>,
    /// Rows may refer to it without a parent.
    pub is_loose: bool,
    prefix: Vec<u8>,
    attnums: Vec<u8>,
    below: OnceCell<Below>,
}

/// What has to follow when a parent moves.
pub struct Below {
    pub hold_parent: Plan,
    pub moves: Vec<Move>,
}

/// A table below.
pub struct Move {
    pub table: u32,
    pub rewrite: Plan,
    /// Keeps others from adding rows below.
    pub hold: Option<Plan>,
    /// Of a table that refers to the key itself: says which of several keys have rows.
    refer: Option<Plan>,
    is_indexed: bool,
}

fn id(prefix: &[u8], values: &[Vec<u8>]) -> Box<[u8]> {
    let mut id = prefix.to_vec();
    for v in values {
        id.extend_from_slice(&(v.len() as u32).to_le_bytes());
        id.extend_from_slice(v);
    }
    id.into()
}

fn prefix(parent: u32, attnums: &[u8]) -> Vec<u8> {
    let mut p = parent.to_le_bytes().to_vec();
    p.extend_from_slice(attnums);
    p.push(0);
    p
}

/// The root of the parent with this id, and the values of its key.
pub fn parts(id: &[u8]) -> Option<(u32, Vec<Vec<u8>>)> {
    let (root, rest) = id.split_first_chunk::<4>()?;
    // Behind the numbers of the columns and a zero.
    let mut rest = &rest[rest.iter().position(|b| *b == 0)? + 1..];
    let mut values = Vec::new();
    while let Some((len, more)) = rest.split_first_chunk::<4>() {
        let (value, more) = more.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        values.push(value.to_vec());
        rest = more;
    }
    Some((u32::from_le_bytes(*root), values))
}

impl Edge {
    /// Writes the id of the parent that a row refers to. `false` when it is not to be had without further ado: a column is
    /// NULL, is no more, or looks as the session's settings have it.
    ///
    /// # Safety
    /// The tuple is of this table.
    pub unsafe fn put_id(
        &self,
        id: &mut Vec<u8>,
        fields: &mut Vec<Field>,
        table: &Rc<Table>,
        tuple: pg_sys::HeapTuple,
    ) -> bool {
        let mut places = self.places.borrow_mut();
        let places = match &*places {
            Some((of, places)) if Rc::ptr_eq(of, table) => places,
            _ => &places.insert((table.clone(), self.places_in(table))).1,
        };
        if places.columns.is_empty() {
            return false;
        }
        let layout = &table.layout;
        id.clear();
        id.extend_from_slice(&self.prefix);
        // SAFETY: by the caller; the width covers the columns.
        unsafe {
            tuple::fields_of((*tuple).t_data, &layout.atts[..places.width], fields);
            for c in &places.columns {
                let at = id.len();
                id.extend_from_slice(&[0; 4]);
                if layout.put_plain(id, *c, fields, row_trigger::stored()) != Found::Value {
                    return false;
                }
                let len = (id.len() - at - 4) as u32;
                id[at..at + 4].copy_from_slice(&len.to_le_bytes());
            }
        }
        true
    }

    /// No columns: they have to be asked for one by one.
    fn places_in(&self, table: &Table) -> Places {
        let layout = &table.layout;
        let columns: Option<Vec<usize>> = self.columns.iter().map(|n| layout.column_named(n)).collect();
        match columns {
            Some(columns) if columns.iter().all(|c| layout.columns[*c].output.is_fixed()) => {
                let width = columns.iter().map(|c| layout.columns[*c].field + 1).max().unwrap_or(0);
                Places { columns, width }
            }
            _ => Places::default(),
        }
    }

    pub fn id(&self, key: &[Vec<u8>]) -> Box<[u8]> {
        id(&self.prefix, key)
    }

    pub fn concerns(&self, news: &News) -> bool {
        news.concerns(self.parent)
    }

    /// What the parent's row with this key says, which stays so until the transaction ends.
    ///
    /// A lock FOR KEY SHARE waits for whoever moves the parent and then answers with the version from before: the key is
    /// the same. And a row that somebody deleted meanwhile is no answer, even when another was put in its place. So the
    /// row is locked first and read afterwards, until both find it or neither does.
    pub fn lookup(&self, key: &[Vec<u8>]) -> Option<Vec<Value>> {
        loop {
            let locked = self.lock.first(key).is_some();
            let row = self.read.first(key);
            if locked == row.is_some() {
                return row;
            }
        }
    }

    /// What it says now.
    pub fn read(&self, key: &[Vec<u8>]) -> Option<Vec<Value>> {
        self.read.first(key)
    }

    /// The way from a table; `None` when its rule has none.
    pub fn load(child: u32) -> Option<Self> {
        let row = ask(
            "SELECT parent::text, owner::text, array_to_string(columns, E'\\x01'), array_to_string(parent_columns, E'\\x01'), \
             array_to_string(attnums, ','), array_to_string(results, E'\\x01'), leads_on::text, needs_settings::text, lookup || ' FOR KEY SHARE OF p', lookup, \
             array_to_string(leaves, E'\\x01'), array_to_string(indexes, E'\\x01') FROM coffer._edge($1::oid)",
            &[child.to_string().into_bytes()],
        )
        .pop()?;
        let [
            parent,
            owner,
            columns,
            parent_columns,
            attnums,
            results,
            leads_on,
            settings,
            lookup,
            read,
            leaves,
            indexes,
        ] = <[Value; 12]>::try_from(row).ok()?;
        let (parent, owner): (u32, u32) = (number(&parent)?, number(&owner)?);
        let columns = list(columns);
        let plan = |statement: &[u8]| Plan::new(statement, columns.len(), owner.into());
        let (lock, read) = (plan(&lookup?), plan(&read?));
        let oids = |v: Value| list(v).into_iter().filter_map(|o| number::<u32>(&Some(o))).map(pg_sys::Oid::from);
        Some(Self {
            parent,
            lock,
            read,
            columns,
            parent_columns: list(parent_columns),
            prefix: prefix(parent, &attnums?),
            results: list(results),
            leads_on: is_true(&leads_on),
            needs_settings: is_true(&settings),
            leaves: oids(leaves).zip(oids(indexes)).collect(),
            places: RefCell::new(None),
        })
    }
}

impl Parent {
    pub fn concerns(&self, news: &News) -> bool {
        self.keys.iter().filter_map(|k| k.below.get()).flat_map(|b| &b.moves).any(|m| news.concerns(m.table))
    }

    pub fn load(root: u32) -> Self {
        let rows = ask(
            "SELECT array_to_string(attnums, ','), array_to_string(columns, E'\\x01'), tenant_column, is_loose::text \
             FROM coffer._parent_keys($1::oid)",
            &[root.to_string().into_bytes()],
        );
        let mut tenant_column = None;
        let keys = rows
            .into_iter()
            .filter_map(|row| {
                let [attnums, columns, tenant, loose] = <[Value; 4]>::try_from(row).ok()?;
                tenant_column = tenant;
                let attnums = attnums?;
                let prefix = prefix(root, &attnums);
                let is_loose = is_true(&loose);
                Some(Key { columns: list(columns), is_loose, prefix, attnums, below: OnceCell::new() })
            })
            .collect();
        Self { keys, tenant_column }
    }
}

impl Key {
    pub fn id(&self, values: &[Vec<u8>]) -> Box<[u8]> {
        id(&self.prefix, values)
    }

    /// What lies below, by this key.
    pub fn below(&self, root: u32) -> &Below {
        self.below.get_or_init(|| {
            let attnums = [b"{", &self.attnums[..], b"}"].concat();
            let parameters = [root.to_string().into_bytes(), attnums];
            let n = self.columns.len();
            let hold = ask("SELECT hold, owner::text FROM coffer._hold_parent($1::oid, $2::int2[])", &parameters)
                .pop()
                .and_then(|row| <[Value; 2]>::try_from(row).ok());
            let Some([Some(hold), owner]) = hold else { pgrx::error!("coffer._hold_parent has no answer for {root}") };
            let moves =
                ask("SELECT relid::text, owner::text, move, hold, refer, is_indexed::text FROM coffer._moves($1::oid, $2::int2[])", &parameters)
                    .into_iter()
                    .filter_map(|row| {
                        let [table, owner, rewrite, hold, refer, indexed] = <[Value; 6]>::try_from(row).ok()?;
                        let owner: u32 = number(&owner)?;
                        let plan = |statement: Vec<u8>| Plan::new(&statement, n, owner.into());
                        Some(Move {
                            table: number(&table)?,
                            rewrite: plan(rewrite?),
                            hold: hold.map(plan),
                            refer: refer.map(plan),
                            is_indexed: is_true(&indexed),
                        })
                    })
                    .collect();
            let owner: u32 = number(&owner).unwrap_or_default();
            Below { hold_parent: Plan::new(&hold, n, owner.into()), moves }
        })
    }
}

impl Below {
    /// Which of these keys rows refer to, by their places, each with one of the tables that such rows are in.
    pub fn referred(&self, keys: &[&[Vec<u8>]]) -> BTreeMap<usize, u32> {
        let width = keys.first().map_or(0, |k| k.len());
        let columns: Vec<Vec<u8>> = (0..width).map(|c| array(keys.iter().map(|k| &k[c][..]))).collect();
        let mut found = BTreeMap::new();
        for m in &self.moves {
            let rows = m.refer.as_ref().map_or_else(Vec::new, |plan| plan.all(&columns));
            for place in rows.iter().filter_map(|row| number::<usize>(row.first()?)) {
                found.insert(place - 1, m.table);
            }
        }
        found
    }

    /// Whether the rows that refer to a key are found without reading a table.
    pub fn is_indexed(&self) -> bool {
        self.moves.iter().all(|m| m.refer.is_none() || m.is_indexed)
    }
}

/// Notes that the foreign key of a table lets rows without a parent pass.
pub fn loosen(table: u32) {
    ask("SELECT '' FROM coffer._loosen($1::oid)", &[table.to_string().into_bytes()]);
}

/// Asks for new bases of what lies below a table.
pub fn rebase_below(root: u32) {
    ask("SELECT '' FROM coffer._rebase_descendants($1::oid)", &[root.to_string().into_bytes()]);
}

/// Texts, as the server reads an array of them.
fn array<'a>(texts: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut array = vec![b'{'];
    for text in texts {
        if array.len() > 1 {
            array.push(b',');
        }
        array.push(b'"');
        for b in text {
            if matches!(b, b'"' | b'\\') {
                array.push(b'\\');
            }
            array.push(*b);
        }
        array.push(b'"');
    }
    array.push(b'}');
    array
}

/// Asks the registry, as the extension's owner.
fn ask(statement: &str, parameters: &[Vec<u8>]) -> Vec<Vec<Value>> {
    let Some(owner) = catalog::owner() else {
        pgrx::error!("the extension pg_coffer is not fully installed here");
    };
    // With the rights of the extension's owner, so not under a search_path that is the session's.
    let level = settings::pin_search_path();
    let rows = Plan::new(statement.as_bytes(), parameters.len(), owner).all(parameters);
    settings::unpin(Some(level));
    rows
}

fn list(v: Value) -> Vec<Vec<u8>> {
    match v {
        Some(v) if !v.is_empty() => v.split(|b| *b == SEPARATOR).map(<[u8]>::to_vec).collect(),
        _ => Vec::new(),
    }
}

fn number<T: FromStr>(v: &Value) -> Option<T> {
    std::str::from_utf8(v.as_deref()?).ok()?.parse().ok()
}

fn is_true(v: &Value) -> bool {
    v.as_deref() == Some(b"true")
}
