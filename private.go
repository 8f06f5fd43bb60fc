package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
)

// Permission bits that are looked at.
const (
	othersEnter fs.FileMode = 0o001
	groupEnter  fs.FileMode = 0o010
	othersAny   fs.FileMode = 0o007
	othersRead  fs.FileMode = 0o004
	othersWrite fs.FileMode = 0o002
	groupRead   fs.FileMode = 0o040
	groupWrite  fs.FileMode = 0o020
)

// protectData keeps the database from other users of this machine. Pebble writes files that everybody may read, so it is the
// folder around them, db, that nobody else may enter. The data directory itself may be the user's, made before: its mode stays, but
// who may write to it can replace the database. That a group may read is left to who made it so.
func protectData(dir string, log *slog.Logger) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make data directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at data directory: %w", err)
	}
	if info.Mode()&othersWrite != 0 && info.Mode()&fs.ModeSticky == 0 {
		log.Warn("every user of this machine can replace what is in the data directory: take the permission to write from others", "dir", dir, "mode", octal(info))
	}
	reachable := info.Mode()&(othersEnter|groupEnter) != 0
	database := filepath.Join(dir, "db") // as backend/embedded calls it
	if err := os.Mkdir(database, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make database directory: %w", err)
	}
	info, err = os.Stat(database)
	if err != nil {
		return fmt.Errorf("look at database directory: %w", err)
	}
	if info.Mode()&(othersAny|groupWrite) == 0 {
		return nil
	}
	before := octal(info)
	err = os.Chmod(database, 0o700)
	if err == nil {
		info, err = os.Stat(database) // not every file system has modes
	}
	switch {
	case !reachable:
	case err != nil || info.Mode()&othersAny != 0:
		log.Warn("other users of this machine can read the database, and that cannot be changed", "dir", database, "mode", before, "error", err)
	default:
		log.Warn("other users of this machine could enter the database directory; now they cannot", "dir", database, "mode_before", before)
	}
	return nil
}

// warnOfExposure says who else than this user may know or replace the secret in a file. It is no error: containers are given
// their secrets in files that everybody in them may read.
func warnOfExposure(path string, log *slog.Logger) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("look at auth secret: %w", err)
	}
	if problem := exposure(info.Mode(), ownerOf(info), os.Geteuid()); problem != "" {
		log.Warn("the file with the secret that signs tokens "+problem, "file", path, "mode", octal(info))
	}
	return nil
}

// warnOfReplaceable says when others can put their own key in place of a file's, which verifies tokens. Everybody may read it.
func warnOfReplaceable(path string, log *slog.Logger) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("look at token keys: %w", err)
	}
	if problem := exposure(info.Mode()&^(othersRead|groupRead), ownerOf(info), os.Geteuid()); problem != "" {
		log.Warn("the file with keys that verify tokens "+problem, "file", path, "mode", octal(info))
	}
	return nil
}

// ownerOf is a user id; root's where the system does not tell.
func ownerOf(info fs.FileInfo) int {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid)
	}
	return 0
}

// exposure is what warnOfExposure says, or "". A file of root's may be readable for the group that the server runs in: the usual way
// to give a secret to a service.
func exposure(mode fs.FileMode, owner, self int) string {
	switch {
	case owner != self && owner != 0:
		return "belongs to another user"
	case mode&othersWrite != 0:
		return "can be replaced by every user of this machine"
	case mode&groupWrite != 0:
		return "can be replaced by its group"
	case mode&othersRead != 0:
		return "can be read by every user of this machine"
	case mode&groupRead != 0 && owner == self:
		return "can be read by its group"
	}
	return ""
}

func octal(info fs.FileInfo) string { return fmt.Sprintf("%#o", info.Mode().Perm()) }
