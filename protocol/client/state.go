package client

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"millrace/protocol"
)

// The state file is a log. It begins with a header and a snapshot, which are written to a temporary file, synced and renamed, so that
// they are there whole or not at all; appended frames follow.
//
//	header    "MRCLIENT" version(4) length of header and snapshot(8) CRC-32C of these(4)
//	frame     length of the records(4) CRC-32C of all but itself(4) own offset(8) synced(8) records
//
// All integers are big endian. "synced" is the offset up to which the file was on stable storage when the frame was written. A power cut may lose
// or tear any part of what followed the last sync, so a bad frame ends the log and is cut off; but when a good
// frame behind it says that the bad one was synced, this is damage and not a torn tail, and the file is refused.
const (
	stateMagic       = "MRCLIENT"
	stateVersion     = 1
	stateHeaderBytes = len(stateMagic) + 4 + 8 + 4
	frameHeaderBytes = 4 + 4 + 8 + 8

	maxFrameBytes     = 1 << 20   // of records in one frame; a turn of the client writes far less
	snapshotFrame     = 256 << 10 // a snapshot starts a new frame after this many
	maxStateBytes     = 256 << 20
	minCompactBytes   = 1 << 20 // a smaller file is never rewritten
	temporarySuffix   = ".new"
	lockSuffix        = ".lock"
	stateFileMode     = 0o600 // messages and what the user has read
	maxRecordOverhead = 64
)

// Records. Integers are uvarints but for the epoch; strings carry their length.
const (
	recIdentity      = 1 // device, user (empty: not known yet)
	recEpoch         = 2 // epoch(8); no number was ever given under it
	recQueued        = 3 // local, queued ms, receiver, text
	recNumbered      = 4 // local, number
	recEnded         = 5 // local
	recShown         = 6 // day, message id(16)
	recReceiptsAfter = 7 // ms
	recCounters      = 8 // next local, highest number of the epoch
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// disk is what a state needs of the operating system; tests put one in its place that loses power.
type disk interface {
	lock(path string) (io.Closer, error)
	open(path string, flag int) (stateFile, error)
	rename(from, to string) error
	syncDirectory(path string) error
}

// stateFile is what a state needs of an *os.File.
type stateFile interface {
	io.ReadWriteCloser
	io.Seeker
	Truncate(size int64) error
	Sync() error
}

// osDisk is the disk of the operating system.
type osDisk struct{}

func (osDisk) lock(path string) (io.Closer, error) { return lockFile(path) }
func (osDisk) open(path string, flag int) (stateFile, error) {
	return os.OpenFile(path, flag, stateFileMode)
}
func (osDisk) rename(from, to string) error    { return os.Rename(from, to) }
func (osDisk) syncDirectory(path string) error { return syncDirectory(path) }

// state is what a client remembers between connections and, with a path, between processes. Changes are
// collected in memory and written by commit. It is owned by the client's goroutine.
type state struct {
	path   string // empty: memory only
	device string
	disk   disk
	lock   io.Closer
	file   stateFile

	size      int64
	synced    int64 // everything before is on stable storage
	compactAt int64
	snapshot  int64  // where the appended part begins
	repaired  int64  // bytes of torn tail that were cut off when opening
	records   []byte // of the frame being built, after room for its header
	err       error  // the first failure; nothing is written after it: what a failed sync has lost is not known

	user          string
	epoch         uint64
	receiptsAfter int64
	nextLocal     uint64
	shown         *shownSet
}

// openState opens or makes the state at path ("" for memory only) and returns it with the sends that have not ended, in the
// order in which they were given, and the highest number given.
func openState(d disk, path, device string, now time.Time) (st *state, items []Item, highest uint64, err error) {
	st = &state{path: path, device: device, disk: d, nextLocal: 1}
	if path == "" {
		st.shown = newShownSet(MaxShownInMemory)
		st.epoch = newEpoch()
		return st, nil, 0, nil
	}
	st.shown = newShownSet(MaxShownOnDisk)
	st.lock, err = d.lock(path + lockSuffix)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("lock state %s: %w", path, err)
	}
	items, highest, err = st.open(now)
	if err != nil {
		st.close()
		return nil, nil, 0, fmt.Errorf("open state %s: %w", path, err)
	}
	return st, items, highest, nil
}

func newEpoch() uint64 {
	for {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		if e := binary.BigEndian.Uint64(b[:]); e != 0 {
			return e
		}
	}
}

func (st *state) open(now time.Time) (items []Item, highest uint64, err error) {
	content, err := st.read()
	switch {
	case err != nil:
		return nil, 0, err
	case len(content) == 0:
		st.epoch = newEpoch()
		return nil, 0, st.rewrite(nil, 0)
	case len(content) > maxStateBytes:
		return nil, 0, fmt.Errorf("%w: over %d bytes", ErrStateCorrupt, maxStateBytes)
	}
	items, highest, err = st.replay(content)
	if err != nil {
		return nil, 0, err
	}
	st.shown.forget(now)
	return items, highest, st.reopen()
}

// read returns the file; none at all is like an empty one. Of one that is too long it returns more than maxStateBytes.
func (st *state) read() ([]byte, error) {
	f, err := st.disk.open(st.path, os.O_RDONLY)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(f, maxStateBytes+1))
	return content, errors.Join(err, f.Close())
}

// replay takes the content of the file and sets size to the end of what is good.
func (st *state) replay(content []byte) (items []Item, highest uint64, err error) {
	snapshot, err := parseStateHeader(content)
	if err != nil {
		return nil, 0, err
	}
	st.snapshot = snapshot
	r := replayer{st: st, open: make(map[uint64]*Item)}
	at := int64(stateHeaderBytes)
	for at < int64(len(content)) {
		records, next, ok := parseStateFrame(content, at)
		if !ok {
			if at < snapshot || wasSynced(content, at) {
				return nil, 0, fmt.Errorf("%w: at byte %d of %d", ErrStateCorrupt, at, len(content))
			}
			break
		}
		if err := r.apply(records); err != nil {
			return nil, 0, fmt.Errorf("%w: at byte %d: %w", ErrStateCorrupt, at, err)
		}
		at = next
	}
	if at < snapshot {
		return nil, 0, fmt.Errorf("%w: it ends at byte %d, within its snapshot", ErrStateCorrupt, at)
	}
	st.size, st.repaired = at, int64(len(content))-at
	return r.items(), r.highest, nil
}

func parseStateHeader(b []byte) (snapshot int64, err error) {
	n := stateHeaderBytes - 4
	if len(b) < stateHeaderBytes || string(b[:len(stateMagic)]) != stateMagic {
		return 0, fmt.Errorf("%w: it does not begin like one", ErrStateCorrupt)
	}
	if crc32.Checksum(b[:n], castagnoli) != binary.BigEndian.Uint32(b[n:]) {
		return 0, fmt.Errorf("%w: in its header", ErrStateCorrupt)
	}
	if v := binary.BigEndian.Uint32(b[len(stateMagic):]); v != stateVersion {
		return 0, fmt.Errorf("written by another version (%d)", v)
	}
	return int64(binary.BigEndian.Uint64(b[len(stateMagic)+4:])), nil
}

// parseStateFrame reads the frame at an offset; ok is false when it is not whole.
func parseStateFrame(content []byte, at int64) (records []byte, next int64, ok bool) {
	b := content[at:]
	if len(b) < frameHeaderBytes {
		return nil, 0, false
	}
	n := int64(binary.BigEndian.Uint32(b))
	if n > maxFrameBytes || n > int64(len(b)-frameHeaderBytes) || binary.BigEndian.Uint64(b[8:]) != uint64(at) {
		return nil, 0, false
	}
	end := frameHeaderBytes + n
	if frameChecksum(b[:end]) != binary.BigEndian.Uint32(b[4:]) {
		return nil, 0, false
	}
	return b[frameHeaderBytes:end], at + end, true
}

func frameChecksum(frame []byte) uint32 {
	sum := crc32.Update(0, castagnoli, frame[:4])
	return crc32.Update(sum, castagnoli, frame[8:])
}

// wasSynced reports whether a good frame behind bad says that what stands at bad had been synced.
func wasSynced(content []byte, bad int64) bool {
	for at := bad + 1; at <= int64(len(content)-frameHeaderBytes); at++ {
		if binary.BigEndian.Uint64(content[at+8:]) != uint64(at) {
			continue // a frame carries its own offset, so that this search is cheap
		}
		if _, _, ok := parseStateFrame(content, at); ok && binary.BigEndian.Uint64(content[at+16:]) > uint64(bad) {
			return true
		}
	}
	return false
}

// replayer turns records into a state.
type replayer struct {
	st      *state
	open    map[uint64]*Item
	highest uint64
}

var errRecord = errors.New("malformed record")

func (r *replayer) apply(records []byte) error {
	d := recordReader{b: records}
	for len(d.b) > 0 && !d.bad {
		switch kind := d.byte(); kind {
		case recIdentity:
			device, user := d.text(), d.text()
			if !d.bad && device != r.st.device {
				return fmt.Errorf("%w: device %q", ErrStateMismatch, device)
			}
			r.st.user = user
		case recEpoch:
			r.st.epoch = d.fixed64()
			r.highest = 0
		case recQueued:
			it := &Item{Local: d.uvarint(), QueuedMs: int64(d.uvarint()), Receiver: d.text(), Text: d.text()}
			r.open[it.Local] = it
			r.st.nextLocal = max(r.st.nextLocal, it.Local+1)
		case recNumbered:
			local, seq := d.uvarint(), d.uvarint()
			if it := r.open[local]; it != nil {
				it.Seq = seq
			}
			r.highest = max(r.highest, seq)
		case recEnded:
			delete(r.open, d.uvarint())
		case recShown:
			day := uint32(d.uvarint())
			r.st.shown.add(shownID{d.id(), day})
		case recReceiptsAfter:
			r.st.receiptsAfter = int64(d.uvarint())
		case recCounters:
			r.st.nextLocal = max(r.st.nextLocal, d.uvarint())
			r.highest = max(r.highest, d.uvarint())
		default:
			return fmt.Errorf("%w of kind %d", errRecord, kind)
		}
	}
	if d.bad {
		return errRecord
	}
	return nil
}

// items lists what has not ended in the order in which it was given.
func (r *replayer) items() []Item {
	list := make([]Item, 0, len(r.open))
	for _, it := range r.open {
		list = append(list, *it)
	}
	sortItems(list)
	return list
}

// reopen opens the file for appending, cuts a torn tail off and syncs the file and its name: a process that was killed may have left
// pages that are good but not yet on the disk, or a snapshot that a power cut would replace by the older file.
func (st *state) reopen() error {
	f, err := st.disk.open(st.path, os.O_RDWR)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(st.size), f.Sync()); err != nil {
		return errors.Join(fmt.Errorf("repair: %w", err), f.Close())
	}
	if err := st.disk.syncDirectory(filepath.Dir(st.path)); err != nil {
		return errors.Join(fmt.Errorf("sync directory: %w", err), f.Close())
	}
	if _, err := f.Seek(st.size, io.SeekStart); err != nil {
		return errors.Join(err, f.Close())
	}
	st.file, st.synced = f, st.size
	st.compactAt = max(minCompactBytes, 2*st.snapshot)
	return nil
}

// rewrite replaces the file by a snapshot of the state and the sends that have not ended.
func (st *state) rewrite(ob *Outbox, highest uint64) error {
	content := st.snapshotBytes(ob, highest)
	temporary := st.path + temporarySuffix
	if err := st.writeSynced(temporary, content); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if st.file != nil {
		if err := st.file.Close(); err != nil {
			return fmt.Errorf("close log: %w", err)
		}
		st.file = nil
	}
	if err := st.disk.rename(temporary, st.path); err != nil {
		return fmt.Errorf("put snapshot in place: %w", err)
	}
	st.size, st.snapshot = int64(len(content)), int64(len(content))
	return st.reopen()
}

func (st *state) writeSynced(path string, content []byte) error {
	f, err := st.disk.open(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (st *state) snapshotBytes(ob *Outbox, highest uint64) []byte {
	w := snapshotWriter{out: make([]byte, stateHeaderBytes, 4096)}
	w.begin()
	w.out = appendIdentity(w.out, st.device, st.user)
	w.out = append(w.out, recEpoch)
	w.out = binary.BigEndian.AppendUint64(w.out, st.epoch)
	w.out = appendRecord(w.out, recReceiptsAfter, uint64(st.receiptsAfter))
	w.out = appendRecord(w.out, recCounters, st.nextLocal, highest)
	st.shown.each(func(e shownID) {
		w.split()
		w.out = appendShown(w.out, e)
	})
	if ob != nil {
		ob.Items(func(it *Item) bool {
			w.split()
			w.out = appendQueued(w.out, it)
			if it.Seq != 0 {
				w.out = appendRecord(w.out, recNumbered, it.Local, it.Seq)
			}
			return true
		})
	}
	w.end()
	b := append(w.out[:0], stateMagic...)
	b = binary.BigEndian.AppendUint32(b, stateVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(len(w.out)))
	binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return w.out
}

// snapshotWriter cuts records into frames.
type snapshotWriter struct {
	out   []byte
	frame int
}

func (w *snapshotWriter) begin() {
	w.frame = len(w.out)
	w.out = append(w.out, make([]byte, frameHeaderBytes)...)
}

func (w *snapshotWriter) end() { putFrameHeader(w.out[w.frame:], int64(w.frame), 0) }

func (w *snapshotWriter) split() {
	if len(w.out)-w.frame >= snapshotFrame {
		w.end()
		w.begin()
	}
}

// putFrameHeader fills the header of a frame whose records are in place.
func putFrameHeader(frame []byte, offset, synced int64) {
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-frameHeaderBytes))
	binary.BigEndian.PutUint64(frame[8:], uint64(offset))
	binary.BigEndian.PutUint64(frame[16:], uint64(synced))
	binary.BigEndian.PutUint32(frame[4:], frameChecksum(frame))
}

// queued, numbered, ended, showed, setUser, setEpoch and setReceiptsAfter note changes; commit writes them.

func (st *state) queued(it *Item) { st.note(func(b []byte) []byte { return appendQueued(b, it) }) }

func (st *state) numbered(it *Item) {
	st.note(func(b []byte) []byte { return appendRecord(b, recNumbered, it.Local, it.Seq) })
}

func (st *state) ended(local uint64) {
	st.note(func(b []byte) []byte { return appendRecord(b, recEnded, local) })
}

func (st *state) showed(e shownID) {
	st.note(func(b []byte) []byte { return appendShown(b, e) })
}

func (st *state) setUser(user string) {
	st.user = user
	st.note(func(b []byte) []byte { return appendIdentity(b, st.device, user) })
}

func (st *state) setEpoch(epoch uint64) {
	st.epoch = epoch
	st.note(func(b []byte) []byte { return binary.BigEndian.AppendUint64(append(b, recEpoch), epoch) })
}

func (st *state) setReceiptsAfter(ms int64) {
	st.receiptsAfter = ms
	st.note(func(b []byte) []byte { return appendRecord(b, recReceiptsAfter, uint64(ms)) })
}

func (st *state) note(record func([]byte) []byte) {
	if st.path == "" {
		return
	}
	if len(st.records) == 0 {
		st.records = append(st.records, make([]byte, frameHeaderBytes)...)
	}
	st.records = record(st.records)
	if len(st.records) > maxFrameBytes-protocol.MaxContentBytes-protocol.MaxUserBytes-maxRecordOverhead {
		st.write()
	}
}

// commit writes what was noted; after it a killed process has lost nothing. With sync it is on stable storage. It blocks on the
// disk. An error is final: every later commit returns it.
func (st *state) commit(sync bool) error {
	st.write()
	if st.err == nil && sync && st.synced < st.size {
		if err := st.file.Sync(); err != nil {
			st.err = fmt.Errorf("sync state %s: %w", st.path, err)
		} else {
			st.synced = st.size
		}
	}
	return st.err
}

func (st *state) write() {
	if len(st.records) == 0 || st.err != nil {
		return
	}
	putFrameHeader(st.records, st.size, st.synced)
	n, err := st.file.Write(st.records)
	st.size += int64(n)
	st.records = st.records[:0]
	if err != nil {
		st.err = fmt.Errorf("write state %s: %w", st.path, err)
	}
}

// compact rewrites the file when most of it is about things that have ended.
func (st *state) compact(ob *Outbox) error {
	if st.path == "" || st.err != nil || st.size < st.compactAt {
		return st.err
	}
	if err := st.commit(false); err != nil {
		return err
	}
	if err := st.rewrite(ob, ob.Highest()); err != nil {
		st.err = fmt.Errorf("compact state %s: %w", st.path, err)
	}
	return st.err
}

// close syncs what was noted and gives the lock back.
func (st *state) close() error {
	if st.path == "" {
		return nil
	}
	var errs []error
	if st.file != nil {
		errs = append(errs, st.commit(true), st.file.Close())
		st.file = nil
	}
	if st.lock != nil {
		errs = append(errs, st.lock.Close())
		st.lock = nil
	}
	return errors.Join(errs...)
}

func appendIdentity(b []byte, device, user string) []byte {
	return appendText(appendText(append(b, recIdentity), device), user)
}

func appendQueued(b []byte, it *Item) []byte {
	b = appendRecord(b, recQueued, it.Local, uint64(it.QueuedMs))
	return appendText(appendText(b, it.Receiver), it.Text)
}

func appendShown(b []byte, e shownID) []byte {
	return append(appendRecord(b, recShown, uint64(e.day)), e.id[:]...)
}

func appendRecord(b []byte, kind byte, fields ...uint64) []byte {
	b = append(b, kind)
	for _, v := range fields {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// recordReader reads fields; after its first error it returns zeros.
type recordReader struct {
	b   []byte
	bad bool
}

func (d *recordReader) take(n uint64) []byte {
	if d.bad || n > uint64(len(d.b)) {
		d.bad = true
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *recordReader) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *recordReader) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.bad = true
		return 0
	}
	d.take(uint64(n))
	return v
}

func (d *recordReader) fixed64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *recordReader) text() string { return string(d.take(d.uvarint())) }

func (d *recordReader) id() (id protocol.MessageID) {
	copy(id[:], d.take(uint64(len(id))))
	return id
}
